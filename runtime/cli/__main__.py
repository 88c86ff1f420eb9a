"""python -m ppllava_edge.runtime.cli: the same as ppllava-run."""

from ppllava_edge.runtime.cli.main import main

if __name__ == "__main__":
    main()
