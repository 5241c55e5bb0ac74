"""The two models, cut below the adapted layers. The layers below are frozen, so each question passes through them once
for all runs. Without dropout this changes no result, and it saves most of the time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import minilm
import smollm2
import torch
from questions import Encoder, Question
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from .data import Choice
from .methods import ALL, Method

PREFIX_BATCH = 32
PROMPT = 1  # in a layout; padding is 0 and answer k is k + 2
LONGEST = 256  # tokens; nothing here has more
MINILM_TARGETS = {
    ALL: r".*\.(query|key|value|dense)",
    "query and value": r".*\.(query|value)",
    "attention": r".*\.attention\..*\.(query|key|value|dense)",
    "MLP": r".*\.\d+\.(intermediate|output)\.dense",
}
SMOLLM2_TARGETS = {
    ALL: r".*\.(q|k|v|up|down)_proj",
    "query and value": r".*\.(q|v)_proj",
    "attention": r".*\.(q|k|v|o)_proj",
    "MLP": r".*\.(gate|up|down)_proj",
}


@dataclass(frozen=True)
class Batch:
    """Questions in the form that the adapted layers take.

    Shapes: ``hidden`` (questions, longest, width), ``layout`` (questions, longest) or (questions, longest, 2), see
    :meth:`CutModel.tokens`, ``labels`` (questions,).
    """

    hidden: Tensor
    layout: Tensor
    labels: Tensor


class Upper(nn.Module):
    """The adapted layers and the head that scores the classes.

    Args:
        body: takes ``inputs_embeds`` and returns hidden states.
        head: scores the classes.
        causal: whether the last position of left-padded rows is scored; otherwise the mean of all positions.
    """

    def __init__(self, body: nn.Module, head: nn.Linear, causal: bool) -> None:
        super().__init__()
        self.body, self.head, self.causal = body, head, causal

    @property
    def padding_side(self) -> str:
        """Where rows are padded."""
        return "left" if self.causal else "right"

    def attention(self, layout: Tensor) -> dict[str, Any]:
        """Return the attention mask and the position of each token."""
        if not self.causal:
            return {"attention_mask": layout}
        position = (layout.cumsum(-1) - 1).clamp(min=0)  # padding is not counted
        return {"attention_mask": layout, "position_ids": position, "use_cache": False}

    def forward(self, hidden: Tensor, layout: Tensor) -> Tensor:
        """Return logits (questions, classes)."""
        states = self.body(inputs_embeds=hidden, **self.attention(layout)).last_hidden_state
        if self.causal:
            pooled = states[:, -1]
        else:
            pooled = (states * layout[..., None]).sum(1) / layout.sum(1, keepdim=True)
        logits: Tensor = self.head(pooled)
        return logits


class ChoiceUpper(Upper):
    """The adapted layers of a language model that scores the likelihood of each answer of a question.

    A row holds the prompt and then every answer. An answer's tokens see only the prompt and their own answer, at the
    positions that they would have alone. So one pass gives the same scores as a pass per answer.
    """

    @property
    def padding_side(self) -> str:
        """Where rows are padded."""
        return "right"

    def attention(self, layout: Tensor) -> dict[str, Any]:
        """Return the attention mask and the position of each token."""
        part = layout[..., 0]
        reader, read = part[:, :, None], part[:, None, :]
        longest = part.shape[1]
        seen = (reader == read) | (read == PROMPT)
        seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
        # Causal, so a token's position is the number of tokens that it sees. Padding also sees something, as one part.
        return {"attention_mask": seen[:, None], "position_ids": seen.sum(-1) - 1, "use_cache": False}

    def forward(self, hidden: Tensor, layout: Tensor) -> Tensor:
        """Return the mean log-probability of each answer's tokens, (questions, most answers)."""
        states = self.body(inputs_embeds=hidden, **self.attention(layout)).last_hidden_state
        part, token = layout.unbind(-1)
        row, at = (part > PROMPT).nonzero(as_tuple=True)
        prompts = (part == PROMPT).sum(-1)
        begins = part[row, at] != part[row, at - 1]
        before = torch.where(begins, prompts[row] - 1, at - 1)
        scores = self.head(states[row, before]).log_softmax(-1)
        said = scores.gather(-1, token[row, at, None])[:, 0]
        answer = part[row, at] - PROMPT - 1
        shape = (len(part), int(answer.max()) + 1)
        total = said.new_zeros(shape).index_put((row, answer), said, accumulate=True)
        count = said.new_zeros(shape).index_put((row, answer), torch.ones_like(said), accumulate=True)
        return torch.where(count > 0, total / count.clamp(min=1), -torch.inf)


class CutModel:
    """A model whose upper layers are adapted, with its tokenizer and classes.

    Args:
        lower: embeddings and frozen layers; its last hidden state is the upper layers' input.
        upper: the rest.
        tokenizer: as :meth:`tokens` needs it.
        classes: in the order of the head's outputs.
        targets: sets of linear layers, by their names; each a pattern of the layers' names.
        new_head: whether the head is new and trained in full.
    """

    def __init__(
        self,
        lower: nn.Module,
        upper: Upper,
        tokenizer: Any,
        classes: Sequence[str],
        targets: dict[str, str],
        new_head: bool,
    ) -> None:
        self.lower, self.upper = lower.eval(), upper.eval()
        self.tokenizer, self.classes = tokenizer, list(classes)
        self.targets, self.new_head = targets, new_head
        self._known: dict[Question, tuple[Tensor, Tensor]] = {}

    def fresh(self, seed: int) -> Upper:
        """Return the upper layers, which share the body's weights; a new head is drawn from the seed."""
        torch.manual_seed(seed)
        model = copy.deepcopy(self.upper, {id(p): p for p in self.upper.body.parameters()})
        if self.new_head:
            nn.init.normal_(model.head.weight, std=0.02)
            nn.init.zeros_(model.head.bias)
        return model

    def adapt(self, method: Method, model: nn.Module, seed: int) -> nn.Module:
        """Return the upper layers with a method's adapter, their base frozen."""
        return method.adapt(model, {"target_modules": self.targets[method.modules]}, seed)

    def batch(self, questions: Sequence[Question]) -> Batch:
        """Look the questions up, or compute new ones, and pad."""
        new = [question for question in questions if question not in self._known]
        for start in range(0, len(new), PREFIX_BATCH):
            self._compute(new[start : start + PREFIX_BATCH])
        hidden, layouts = zip(*(self._known[question] for question in questions), strict=True)
        labels = torch.tensor([self.label(question) for question in questions])
        return Batch(self._pad(hidden), self._pad(layouts), labels)

    def label(self, question: Question) -> int:
        """Return the index of the right answer's score."""
        return self.classes.index(question.answer)

    def tokens(self, questions: Sequence[Question]) -> list[tuple[Tensor, Tensor]]:
        """Return each question's tokens, and their layout: 1 for each (padding has 0)."""
        rows = self.tokenizer([q.prompt for q in questions], truncation=True, max_length=LONGEST).input_ids
        return [(torch.tensor(row), torch.ones(len(row), dtype=torch.long)) for row in rows]

    def _pad(self, rows: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_side=self.upper.padding_side)

    @torch.no_grad()
    def _compute(self, questions: list[Question]) -> None:
        ids, layouts = zip(*self.tokens(questions), strict=True)
        layout = self._pad(layouts)
        hidden = self.lower(input_ids=self._pad(ids), **self.upper.attention(layout)).last_hidden_state
        first = layout if layout.dim() == 2 else layout[..., 0]
        for question, row, keep, own in zip(questions, hidden, first.bool(), layouts, strict=True):
            self._known[question] = row[keep].clone(), own


class ChoiceModel(CutModel):
    """A cut language model whose questions carry their answers; ``classes`` are all the answers that occur."""

    def __init__(
        self,
        lower: nn.Module,
        upper: ChoiceUpper,
        tokenizer: PreTrainedTokenizerBase,
        classes: Sequence[str],
        targets: dict[str, str],
    ) -> None:
        super().__init__(lower, upper, tokenizer, classes, targets, new_head=False)
        self.answers = answer_tokens(self.tokenizer, self.classes)
        self.place = {token: place for place, token in enumerate(vocabulary(self.answers))}

    def label(self, question: Question) -> int:
        """Return which of the scores is the right answer's."""
        assert isinstance(question, Choice)  # tasks of such models have only these
        return question.choices.index(question.answer)

    def tokens(self, questions: Sequence[Question]) -> list[tuple[Tensor, Tensor]]:
        """Return each question's tokens, prompt and answers, and their layout: part (1 is the prompt, k + 2 answer k,
        0 padding), and the token's place in the cut vocabulary."""
        found = []
        for question in questions:
            assert isinstance(question, Choice)
            rows = [self.tokenizer(question.prompt).input_ids, *(self.answers[a] for a in question.choices)]
            part = [PROMPT + k for k, row in enumerate(rows) for _ in row]
            place = [0 if k == 0 else self.place[token] for k, row in enumerate(rows) for token in row]
            layout = torch.stack([torch.tensor(part), torch.tensor(place)], dim=-1)
            found.append((torch.tensor(list(chain(*rows))), layout))
        return found


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> dict[str, list[int]]:
    """Return the tokens of each answer, as they follow a prompt after one space."""
    rows = tokenizer([f" {answer}" for answer in answers], add_special_tokens=False).input_ids
    return dict(zip(answers, rows, strict=True))


def vocabulary(answers: dict[str, list[int]]) -> list[int]:
    """Return the tokens that occur in answers, in order."""
    return sorted(set(chain(*answers.values())))


class Given(nn.Module):
    """Replaces the embeddings: the hidden state is given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """Return the given hidden state."""
        return inputs_embeds


def cut_minilm(classes: Sequence[str], layers: int) -> CutModel:
    """all-MiniLM-L6-v2, its upper ``layers`` of 6 adapted: a new head on the mean of the tokens, as it was trained."""
    folder = minilm.locate()
    lower, body = (
        AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False) for _ in range(2)
    )
    lower.encoder.layer = lower.encoder.layer[:-layers]
    body.encoder.layer = body.encoder.layer[-layers:]
    body.embeddings = Given()
    upper = Upper(body, nn.Linear(body.config.hidden_size, len(classes)), causal=False)
    return CutModel(
        lower, upper, AutoTokenizer.from_pretrained(folder), classes, MINILM_TARGETS, new_head=True
    )


def cut_smollm2(classes: Sequence[str], layers: int) -> CutModel:
    """SmolLM2-135M, its upper ``layers`` of 30 adapted. Only the answers' first tokens are scored."""
    lower, body, embeddings, tokenizer = halves_of_smollm2(layers)
    encoder = Encoder(tokenizer, set(classes), LONGEST)
    upper = Upper(body, rows_of(embeddings, encoder.answer_tokens.tolist()), causal=True)
    return CutModel(lower, upper, tokenizer, encoder.answers, SMOLLM2_TARGETS, new_head=False)


def cut_smollm2_choices(classes: Sequence[str], layers: int) -> CutModel:
    """The same for questions with answers of their own: all tokens that occur in answers are scored."""
    lower, body, embeddings, tokenizer = halves_of_smollm2(layers)
    tokens = vocabulary(answer_tokens(tokenizer, classes))
    upper = ChoiceUpper(body, rows_of(embeddings, tokens), causal=True)
    return ChoiceModel(lower, upper, tokenizer, classes, SMOLLM2_TARGETS)


def halves_of_smollm2(layers: int) -> tuple[nn.Module, nn.Module, Tensor, PreTrainedTokenizerBase]:
    """The model's lower layers, its upper layers, its embeddings (also its head) and its tokenizer."""
    folder = smollm2.cached_model()
    lower, body = (AutoModel.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    embeddings = body.embed_tokens.weight
    halve(lower, body, layers)
    return lower, body, embeddings, AutoTokenizer.from_pretrained(folder)


def halve(lower: Any, body: Any, layers: int) -> None:
    """Cut two copies of a decoder: one keeps what lies below the upper layers, the other these layers."""
    lower.layers, body.layers = lower.layers[:-layers], body.layers[-layers:]
    lower.config.num_hidden_layers = len(lower.layers)
    lower.norm, body.embed_tokens = nn.Identity(), nn.Identity()


def rows_of(embeddings: Tensor, tokens: Sequence[int]) -> nn.Linear:
    """A head that scores these tokens."""
    head = nn.Linear(embeddings.shape[1], len(tokens), bias=False)
    head.weight = nn.Parameter(embeddings[list(tokens)].detach().clone())
    return head
