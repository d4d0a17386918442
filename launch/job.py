"""The node process under the name that job scripts of earlier versions call; scripts that still wait in a queue need it."""

from launch.execute.node_process import run

if __name__ == "__main__":
    run()
