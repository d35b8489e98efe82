"""Trains in a process of its own, as the command line does: `python train_process.py CONFIG DATA_FOLDER`."""

import sys

from ultrathink_model.command_line import run_and_exit
from ultrathink_model.config import load_config
from ultrathink_model.data import load_manifest
from ultrathink_model.training.run import train


def main() -> None:
    config = load_config(sys.argv[1])
    print(train(config, manifest=load_manifest(sys.argv[2]), run_name="tiny").model_dump_json())


if __name__ == "__main__":
    run_and_exit(main)
