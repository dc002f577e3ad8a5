"""Run pytest with another build of the C++ module: `python sanitized.py PATH/_C...so [pytest's arguments]`.

A module built with -DRLHF_FAST_SANITIZE=ON needs libasan in LD_PRELOAD: `make sanitize` sets all of this up.
"""

from __future__ import annotations

import importlib.util
import sys

import pytest

import rlhf_fast

if __name__ == "__main__":
    path, *arguments = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("rlhf_fast._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["rlhf_fast._C"] = rlhf_fast._C = module
    raise SystemExit(pytest.main(arguments))
