"""Distance between real digits, the best score possible: `python -m benchmarks.experiments.real_data_distance`.

Random training images, as many of each class as among the samples, are compared with all training images. The same is
done for as many training images as there are held-out images, and for the held-out images.
"""

from benchmarks.experiments.common import SCALES, floor, scorer
from benchmarks.harness import RESULTS, provenance, write_result

RESULT = RESULTS / "real_data_distance.json"


def main() -> None:
    images, held_out, image_scorer = scorer()
    found = {
        "command": "python -m benchmarks.experiments.real_data_distance",
        **provenance("cpu", "scikit-learn"),
        "as many as a score has samples": floor(images, image_scorer, int(SCALES["full"]["samples"])),
        "as many as are held out": floor(images, image_scorer, len(held_out)),
        "held out": vars(image_scorer.score(held_out.x, held_out.y)),
    }
    write_result(RESULT, found)
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
