"""The sentences of the study's page, between its tables."""

AGAINST_LORA = """Differences in points of accuracy, with Student's 95 % interval. The last column is the mean over the
tasks. Its interval measures the spread between seeds, so it holds for these tasks only."""
SPECTRUM = """Accuracy of SMoA with its spectral blocks minus accuracy of SMoA with random blocks: blocks of the same
sizes, and so as many parameters, whose coordinates are drawn at random. Random blocks were trained for K=2 at r=8 and
for K=4 at r=32 only."""
ORDERS = """## Does the order matter?

Accuracy of SMoA with another order minus accuracy with the spectral one, of single coordinates; both have as many
parameters. Contiguous blocks are slices of W0. With granule 8, runs of 8 neighbours are sorted by the spectrum as one
([definition](../../docs/definition.md#other-orders-and-granules)). Test runs of the other orders were made on {}; those
of the spectral one on {}. Where the processors differ, a difference holds that of their rounding too (see above)."""
HEADS = """Rows of query, key and value belong to attention's heads. Contiguous blocks hold whole heads of MiniLM (6 of
12 at K=2, 3 at K=4). In SmolLM2, with 9 heads (3 of keys and values), every cut goes through a head. Means over the
tasks of each model:"""
DECIDED = """How much the result depends on a single task: the same averages with each task left out in turn, in points
with 95 % intervals."""
GAPS = "These combinations were not judged on test:"
RATES = """Each method tried the same learning rates ({}{}), once each, with a seed that is not used on test. Where the
best rate was the smallest or the largest, further ones were tried. The list of rates was not fixed beforehand: it first
ended at 0.1, then at 0.2, then at 0.5, since SMoA still gained at the end; each time every method tried the new rate.
Each cell has the best rate; in brackets the rates around it that lose at most two points, or "edge" where the best one
is the smallest or the largest that was tried; and its accuracy on validation:"""
LIMITS = """Limits: runs are short and adapt only the upper layers. The learning rate is chosen by one run each on
validation. Intervals measure the spread between seeds, not the choice of the test questions, which all methods share.
Everything is float32, since bfloat16 was no faster at these sizes."""
CONTROLS = (
    """They check whether a condition of the study decides its result. The averages above leave them out."""
)
ALPHA = """## Alpha

The update is multiplied by alpha / r, which is 1 in all runs above. Another alpha has another best learning rate.

![accuracy on validation by learning rate and alpha](quality-alpha.svg)"""
RANKS = """## Another rank at the same learning rate

SMoA K=2 at r=4 and r=32, with the learning rate that was best at r=8 and three rules for alpha that agree at r=8: alpha
equal to r (the scaling stays 1), growing as √r (the scaling falls with √r: `use_rslora`), constant (the scaling falls
with r)."""
MODULES = """## Modules

Which linear layers of the adapted blocks carry an adapter. The base carries one on all layers that the study adapts
(MiniLM: query, key, value, attention output and both MLP layers; SmolLM2: q, k, v, up, down). "As large" has as many
parameters as the base, by a larger r. The search started with three rates around the base's best one, and went on while
the best was the smallest or the largest."""
COST = """Means over the runs on test. Parameters are the adapter's. Rank and effective rank are those of ΔW, divided by
the largest possible one, averaged over the adapted layers. Effective rank is that of Roy and Vetterli (2007): the
exponential of the entropy of τ / Σ τ, where τ are the singular values ([compared with the one of
energies](../../docs/spectrum.md#definitions)). The last columns are the shares of `Σ τ²` in the first singular values
([whole spectra of two updates](../../docs/spectrum.md#smollm2-135m-on-trec)). Seconds are CPU time on a machine that
other programs used too: they show an order of magnitude."""
PROTOCOL = """Every method adapts the same linear layers in float32, with AdamW, scaling 1 (alpha = r) and no dropout.
A seed sets the initial values, the order of the questions and the random blocks. The layers below the adapted ones
are frozen; their output is computed once per question, which changes no result. MiniLM's new head is trained in full:
with every adapter at one learning rate ({:g}), and alone, as "no adapter", at a searched rate. Parameter counts leave
it out. SmolLM2 has no new head, so "no adapter" trains nothing there. Minutes of CPU are those of all runs of a task,
one thread each; `make quality` spreads a task's methods over the processors, so two of them take about half as long.
K=4 with r=32 and K=8 with r=64, which have as many parameters as LoRA, are a separate sweep (`--sweep larger`).
Rounding differs between processors: when the test runs of TREC-6 and Social IQa were repeated on another one, a
method's mean moved by up to 1.0 and 1.7 points. On TREC-50 the five test runs of SMoA K=2, repeated on the Xeon of
family 6, model 167, had the accuracies of those recorded on an AMD EPYC. `data.py` in
`benchmarks/quality/` says where the questions come from."""
