# `make report` is all that a fresh machine needs: it sets up .venv, runs the notebooks and builds the report.

PROFILE ?= scenes
VENV    ?= .venv
PYTHON  ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
# The lines that matter come from the notebooks; QUIET= shows Snakemake's own too.
QUIET   ?= --quiet all
BIN      = $(VENV)/bin

# All cores: one notebook at a time, and it gets all of them (fewer with OMP_NUM_THREADS).
# --nolock, --rerun-incomplete: after a kill, the next `make report` goes on where the last one was. Each step
# takes its own lock, so a notebook that outlived the kill is waited for and not run twice.
# mtime is about the done.json files; a notebook's time does not count, as no rule has a notebook as input.
SNAKEMAKE_FLAGS = --cores $${OMP_NUM_THREADS:-all} --nolock --rerun-incomplete \
	--rerun-triggers params input mtime --scheduler greedy $(QUIET)

# A student that fails: stop (default), or with KEEP_GOING=1 train the others and report without it.
KEEP_GOING ?=
# Cores of each student's training; THREADS=1 trains several side by side, which is faster for a long list of them.
THREADS ?=
# Real captions for bench-latency, a Parquet file with a column `text`; without it those of scenes are used.
CAPTIONS ?=

.PHONY: help setup test test-cluster report sweep readme lab data bench-models bench-latency bench-losses bench-data bench-train clean

help:
	@echo "make report [PROFILE=scenes]  run the notebooks of a profile, build report/build/report.pdf [THREADS=1] [KEEP_GOING=1]"
	@echo "make sweep [PROFILE=scenes]   the same on a Slurm cluster, as profiles/slurm/config.yaml says"
	@echo "make test                     run the tests"
	@echo "make test-cluster             run smoke through a Slurm that it installs and starts (root in a Debian container)"
	@echo "make lab                      open the notebooks in JupyterLab"
	@echo "make readme                   make the tables in README.md anew from results/"
	@echo "make bench-latency            time full-size towers and backends into results/latency [CAPTIONS=file.parquet]"
	@echo "make bench-losses             time each loss, and primary components against a singular value decomposition"
	@echo "make bench-data               time decoding, tokenizing and the feature cache [CAPTIONS=file.parquet]"
	@echo "make data SOURCE=coco         fetch a published data set into DATA=data/coco"
	@echo "make bench-train              time training steps without distillation, from cached features, with an online teacher [TRAIN=--model ...]"
	@echo "make setup                    create or update $(VENV); the targets above do so themselves"
	@echo "make clean [PROFILE=scenes]   delete runs/PROFILE (models, caches); results/ stays"
	@echo "Profiles: $(basename $(notdir $(wildcard notebooks/profiles/*.yaml)))"

setup: $(VENV)/.done

$(VENV)/.done: requirements.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' || { \
		echo "Python 3.11 or 3.12 is needed, and '$(PYTHON)' is neither: make setup PYTHON=/path/to/python3.11"; \
		exit 1; }
	@echo "Installing the packages of requirements.txt into $(VENV): about two minutes"
	@"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@if git rev-parse --git-dir >/dev/null 2>&1; then \
		git config filter.nbstripout.clean '$(BIN)/python -m nbstripout'; \
		git config filter.nbstripout.smudge cat; \
		git config filter.nbstripout.required true; \
		git config filter.nbstripout.extrakeys 'metadata.papermill cell.metadata.papermill'; \
		git config diff.ipynb.textconv '$(BIN)/python -m nbstripout -t'; \
	fi
	@touch $@

test: setup
	$(BIN)/python -m pytest

test-cluster: $(VENV)/.cluster
	$(BIN)/python tests/cluster/run.py

report: setup
	@$(BIN)/python -m jettclip.pipeline check $(PROFILE)
	@run="$(BIN)/python -m snakemake $(if $(SLURM),--profile profiles/slurm,$(SNAKEMAKE_FLAGS)) \
		--config profile=$(PROFILE) $(if $(THREADS),threads=$(THREADS))"; \
	$$run $(if $(KEEP_GOING),--keep-going) || { \
		$(if $(KEEP_GOING),$$run holes=1 && echo "The report in report/build lacks these students:" && \
			$(BIN)/python -m jettclip.pipeline check $(PROFILE) | grep "^to do  02";) \
		echo "Stopped. If no line above says why: make report PROFILE=$(PROFILE) QUIET="; exit 1; }
	@echo "The report is in report/build"

# Students that failed are tried again by the next call; until then the report says where they are missing.
sweep: $(VENV)/.cluster
	@$(MAKE) --no-print-directory report SLURM=1 KEEP_GOING=1

# --no-deps: the plugin asks for pandas 2, and its part that needs it (a report on finished jobs) is not used here.
$(VENV)/.cluster: $(VENV)/.done
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
		snakemake-executor-plugin-slurm==2.6.1 snakemake-executor-plugin-slurm-jobstep==0.6.1
	@touch $@

lab: setup
	cd notebooks && ../$(BIN)/jupyter lab

readme: setup
	$(BIN)/python -m jettclip.report readme

bench-models bench-latency: setup
	$(BIN)/python -m jettclip.bench $(if $(CAPTIONS),--captions $(CAPTIONS))

bench-losses: setup
	$(BIN)/python -m jettclip.bench_train losses

bench-data: setup
	$(BIN)/python -m jettclip.bench_data $(if $(CAPTIONS),--captions $(CAPTIONS))

data: setup
	@$(BIN)/python -m jettclip.download $(SOURCE) $(or $(DATA),data/$(SOURCE))

bench-train: setup
	$(BIN)/python -m jettclip.bench_train train $(TRAIN)

clean:
	@test -f notebooks/profiles/$(PROFILE).yaml || { echo "no profile '$(PROFILE)'"; exit 1; }
	@echo "Deleting runs/$(PROFILE); results/ stays as it is"
	@rm -rf runs/$(PROFILE)
