"""Says at the top of a test run whether the official implementations' vectors are at hand: see official.py."""
import official


def pytest_report_header(config):
    if official.VECTORS.is_dir():
        return f"official vectors: {official.VECTORS}"
    return (f"official vectors: none at {official.VECTORS}, their tests are skipped "
            "(name the folder that holds vectors/ in SHARED)")
