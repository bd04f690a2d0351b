# https://just.systems; without just, run the commands below by hand.

# List the recipes.
default:
    @just --list

# Format, lint and types.
check:
    bash tests/run.sh --lint

# All tests of a push, or those of the given pytest arguments.
test *arguments="tests":
    bash tests/run.sh {{arguments}}

# Format, and repair what the linter can.
fix:
    bash launch/install.sh dev,kernels
    .venv/bin/ruff format .
    .venv/bin/ruff check --fix .

# Corpus, tokenizer, pretraining, export and fine-tuning, once.
quickstart:
    bash launch/quickstart.sh

# The tests that take minutes.
nightly:
    bash tests/run.sh -m nightly
