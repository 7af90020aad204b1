"""Time the two expensive parts of FID against pytorch-fid's ways, in turns.

    python tests/benchmarks/fid.py --only frechet
    python tests/benchmarks/fid.py --only features

`frechet` takes about 10 minutes on 2 idle cores. fid_frechet.py and fid_features.py describe their
sides. Exits with 1 if a target is missed.
"""

import argparse
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
if "--one-core" in sys.argv:
    # NumPy's and SciPy's BLAS make their threads when they are imported.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["frechet", "features"], required=True)
    # Only the part that runs is imported: features need torch.
    if "features" in sys.argv or "--only=features" in sys.argv:
        from tests.benchmarks import fid_features as part
    else:
        from tests.benchmarks import fid_frechet as part
    part.run(parser)


if __name__ == "__main__":
    main()
