# Two commands do everything on a fresh machine:  make demo  and  make test.
#   make demo [SCALE=quick] [TEACHER=scratch]   teacher, student, distilled student on the toy KITTI; table and pictures
#   make test                                   the tests
#   make .venv                                  only the environment
PYTHON  ?= python3
SCALE   ?= full
TEACHER ?= shipped

.PHONY: demo test clean

demo: .venv
	.venv/bin/python train.py demo --scale $(SCALE) --teacher $(TEACHER)

test: .venv
	.venv/bin/python -m pytest

# A half-made environment is removed, so that the next call starts afresh.
.venv: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -e ".[test]" || { rm -rf .venv; exit 1; }
	@touch .venv

clean:
	rm -rf .venv runs datasets
