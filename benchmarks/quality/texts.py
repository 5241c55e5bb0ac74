"""What the study's page says in words, between its tables."""

AGAINST_LORA = """Differences in points of accuracy with Student's 95 % interval. The last column is the mean over the
tasks; its interval counts the spread between seeds, so it speaks of these tasks."""
SPECTRUM = """SMoA with its spectral blocks minus SMoA with as large blocks of coordinates drawn at random by the
seed. Blocks are as large, so parameters are as many. Random blocks were drawn for K=2 at r=8 and for K=4 at r=32
only."""
DECIDED = """How much one task decides: the same averages with each task left out in turn, in points with 95 %
intervals."""
GAPS = "The comparison has holes. Not judged on test:"
RATES = """Each method tried the same rates ({}), once each, with a seed that is not
among those on test, and where the best was at an end of them, further ones while it was{}. The rates were not fixed
beforehand: they ended at 0.1, then at 0.2, then at 0.5, since SMoA still gained at the end; every method then tried
the new one. The best one; in brackets the rates around it that lose at most two points, "edge" where the best is the
least or the greatest that was tried; its accuracy on validation:"""
LIMITS = """What limits it: runs are short and adapt the upper layers only, the rate is chosen by one run each on
validation, and intervals count seeds, not the draw of the test questions, which all methods share. Float32 throughout:
bfloat16 was no faster at these sizes."""
CONTROLS = """Whether a condition of the study decides its result. They have no part in the averages above."""
ALPHA = """## Alpha

The update is multiplied by alpha / r, 1 in all runs above. With another alpha the best learning rate is another one.

![accuracy on validation by learning rate and alpha](quality-alpha.svg)"""
RANKS = """## Another rank at the same learning rate

SMoA K=2 at r=4 and r=32 with the learning rate that was best at r=8, and three rules for alpha that agree at r=8: as
large as r (the scaling stays 1), growing as √r (it falls with √r: `use_rslora`), constant (it falls with r)."""
MODULES = """## Modules

Which linear layers of the adapted blocks carry an adapter. The base has all that the study adapts (MiniLM: query, key,
value, attention's output and both of the MLP; SmolLM2: q, k, v, up, down). "As large" has the base's number of
parameters, by a larger r. The search began with three rates around the base's best and went on while the best was at an
end."""
COST = """Means over the runs on test. Parameters are the adapter's. Rank and effective rank are of ΔW, over the most
that is possible, mean over the adapted layers; effective rank is Roy and Vetterli's (2007), the exponential of the
entropy of τ / Σ τ, τ the singular values ([beside the one of energies](../../docs/spectrum.md#definitions)). The last
columns are the shares of `Σ τ²` in the first singular values ([whole spectra of two
updates](../../docs/spectrum.md#smollm2-135m-on-trec)). Seconds are CPU time on a machine that other programs used
besides: good for an order of magnitude."""
PROTOCOL = """Every method adapts the same linear layers in float32, with AdamW, scaling 1 (alpha = r) and no dropout.
Seeds change the initial values, the order of the questions and the random blocks. The layers under the adapted ones are
frozen and computed once per question, which changes no result. MiniLM's new head is trained in full: beside every
adapter at one learning rate ({:g}), and by "no adapter", which trains it alone, at one searched for. No number of
parameters counts it. SmolLM2 has no new head, so there "no adapter" trains nothing. Minutes of CPU are those of all
runs of the table below, one thread each: `make quality` shares a task's methods between as many processes as there
are processors: on two it takes about half of that. K=4 with r=32 and K=8 with r=64, which have as many parameters
as LoRA, are a sweep of their own (`--sweep larger`). Rounding differs between processors: when TREC-6's and Social
IQa's runs on test were repeated on another one, a method's mean moved by up to 1.0 and 1.7 points. `data.py`,
`choice.py` and `siqa.py` in `benchmarks/quality/` say where the questions come from."""
