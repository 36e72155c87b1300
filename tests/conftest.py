"""What tests share: the official vectors are announced, measurements are short, and jobs can run
without a process of their own."""
import contextlib
import functools
from unittest import mock

import official
import pytest


def pytest_report_header(config):
    if official.VECTORS.is_dir():
        return f"official vectors: {official.VECTORS}"
    return (f"official vectors: none at {official.VECTORS}, their tests are skipped "
            "(name the folder that holds vectors/ in SHARED)")


@pytest.fixture(scope="session", autouse=True)
def short_measurements():
    """Every run ends with two seconds that measure its speed. Here three repeats do."""
    from experiments import bench
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "images_per_second",
                      functools.partial(bench.images_per_second, seconds=0))
        yield


@pytest.fixture
def jobs_in_this_process(monkeypatch):
    """`demo.side_by_side` runs each job here, one by one: starting a new Python takes seconds."""
    import train
    from experiments import demo

    def start(job, threads):
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / "errors.txt", "w") as errors, contextlib.redirect_stderr(errors):
            code = train.main([str(word) for word in job.words])
        return mock.Mock(returncode=code, poll=lambda: code)
    monkeypatch.setattr(demo, "start", start)
