"""How often the 95 % intervals of the tables hold the true difference, where the truth is known.

    python benchmarks/interval_coverage.py

Made-up rows: each image has a part of the score of its own, the same in both rows (which pairing takes out), one of its
own in each row, and each seed adds a part to all images. The metric is the mean over the images, so that no resample
needs AP; images and seeds are drawn by the very functions that the tables' intervals come from. Takes a minute.
"""

from __future__ import annotations

import numpy as np

from msil.metrics.bootstrap import image_weights, row_means

IMAGES, SAMPLES, REPEATS = 100, 400, 1000
LEVELS = (0.025, 0.975)


def row(images: np.ndarray, seeds: int, seed_noise: float, generator: np.random.Generator) -> np.ndarray:
    """(seeds, IMAGES) scores. A row's mean over the images scatters by 1 because of the images, and by `seed_noise` a
    seed."""
    own = generator.normal(0, np.sqrt(IMAGES), IMAGES)
    return images + own + generator.normal(0, seed_noise, (seeds, 1))


def covered(seeds: tuple[int, int], seed_noise: float, generator: np.random.Generator) -> bool:
    images = generator.normal(0, 3 * np.sqrt(IMAGES), IMAGES)
    weights = image_weights(IMAGES, SAMPLES, generator) / IMAGES
    means = [row_means(row(images, count, seed_noise, generator) @ weights.T, generator) for count in seeds]
    low, high = np.quantile(means[0] - means[1], LEVELS)
    return bool(low <= 0 <= high)


def main() -> None:
    generator = np.random.default_rng(0)
    noises = (0.0, 1.0, 3.0)
    print("intervals that hold the truth, percent; seed noise in units of the noise of the images")
    print("seeds   " + "  ".join(f"{noise:>8g}" for noise in noises))
    for seeds in ((1, 1), (1, 3), (2, 2), (3, 3), (5, 5), (10, 10)):
        found = [np.mean([covered(seeds, noise, generator) for _ in range(REPEATS)]) for noise in noises]
        print(f"{seeds[0]:>2}, {seeds[1]:>2}  " + "  ".join(f"{100 * share:>8.1f}" for share in found))


if __name__ == "__main__":
    main()
