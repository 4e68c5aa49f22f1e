# make conformance   validate torch and jax against the hand-written reference
# make test          run every test
# make test-lowest   run the tests that need no framework on the lowest versions of all dependencies
# make soak          very many networks, torch and jax: no false alarm (NETWORKS=20000, goes on where it stopped)
# make mutants       tell mistakes in the reference's own backward functions from the originals
# make graded        how small a fault is caught, next to gradcheck, check_grads and fixed tolerances
# make factors       which factors of 1.001 are found over many networks in half precision
# make trust         measure which planted faults are caught, and how many digits are right
#                    (these five write their figures into docs/trust.md)
# Each creates .venv first and needs nothing but Python and pip.

PYTHON ?= python3
NETWORKS ?= 300
SEED ?= 1
BIN = .venv/bin

.PHONY: conformance test test-lowest lint types benchmarks soak mutants graded factors trust

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

conformance: .venv/installed
	$(BIN)/gradproof check --adapter torch --adapter jax --networks $(NETWORKS) --seed $(SEED)

test: .venv/installed
	$(BIN)/pytest --numprocesses auto --dist worksteal

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[test-core]'
	touch $@

# Without torch and JAX, which need newer versions of NumPy and SciPy.
test-lowest: .venv-lowest/installed
	.venv-lowest/bin/pytest --numprocesses auto --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows the layout of an installed copy, not the editable finder.
types: .venv/installed
	rm -rf build/types build/lib
	$(BIN)/python -m pip install --quiet --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --package gradproof

soak: NETWORKS = 20000
soak: .venv/installed
	$(BIN)/python -m gradproof.trust.soak --networks $(NETWORKS) --seed $(SEED) --page docs/trust.md $(SOAK)

mutants: .venv/installed
	$(BIN)/python -m gradproof.trust.mutants --seed $(SEED) --page docs/trust.md

# Networks this small run fastest on one thread.
graded: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m gradproof.trust.graded --seed $(SEED) --page docs/trust.md

factors: .venv/installed
	$(BIN)/python -m gradproof.trust.factors --seed $(SEED) --page docs/trust.md

trust: .venv/installed
	$(BIN)/python -m gradproof.trust.measure

benchmarks: .venv/installed
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/layers.py
