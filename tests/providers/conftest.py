"""Helpers of the servers' and the engines' tests serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "serving"), str(TESTS / "engines")]
