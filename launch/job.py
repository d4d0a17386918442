"""The node process under its old name. Job scripts of earlier versions that still wait in a queue run `python -m launch.job`."""

from launch.execute.node_process import run

if __name__ == "__main__":
    run()
