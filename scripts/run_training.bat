rem = r"""
@echo off
rem One file, two languages: cmd.exe runs these lines, and Python skips them as a string and runs the rest.
set PYTHON=%~dp0..\.venv\Scripts\python.exe
if not exist "%PYTHON%" set PYTHON=python
"%PYTHON%" "%~f0" %*
exit /b %ERRORLEVEL%
"""
"""Trains a profile in the project's folder: `python scripts/run_training.bat --profile small [flags of train_advanced.py]`."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Ranks are started as new processes that read this file again.
if __name__ == "__main__":
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv[0] = str(ROOT / "train_advanced.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
