"""Train, evaluate and sweep detectors from the command line; `python run.py --help` begins with ten useful commands."""

from msil.main import main

if __name__ == "__main__":
    main()
