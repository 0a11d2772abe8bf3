"""`python -m porter.serve MODEL ...`, and what a file that registers models of its own runs with runpy."""

import multiprocessing
import sys

from porter.cli import app
from porter.serve.messages import PROCESS_PREFIX

# Processes of the server import the file that was started again, to know its models; they must not serve too
if __name__ == "__main__" and not multiprocessing.current_process().name.startswith(PROCESS_PREFIX):
    app(["serve", *sys.argv[1:]])
