"""How far apart are two sets of images, in features of a network trained on photographs?

The kernel inception distance of Binkowski et al. (2018), here on any features: the squared maximum
mean discrepancy under the kernel (x . y / D + 1)^3. Unlike a Frechet distance it is unbiased for
small sets, so a few hundred images suffice.
"""

import numpy as np

from star_jax.evaluation import bootstrap
from star_jax.evaluation.bootstrap import Score

DEGREE = 3


def score(true_ND: np.ndarray, generated_ND: np.ndarray, seed: int) -> Score:
    """The distance between two sets of features, with a bootstrap interval.

    The interval resamples pairs of images, with replacement. The usual random subsets share most of
    their images, so that their means vary too little.

    Args:
        true_ND: features of the true images.
        generated_ND: features of the generated images; image n was generated for true image n.
        seed: seed of the resamples.

    Raises:
        ValueError: the shapes differ, or there are fewer than two images.
    """
    terms_NN = pair_terms(true_ND, generated_ND)
    count = len(terms_NN)
    resampled = [
        # A resample of one image has no pair.
        _mean_over_pairs(terms_NN, weights_RN[weights_RN.max(-1) < count])
        for weights_RN in bootstrap.resample_weights(count, seed)
    ]
    value = _mean_over_pairs(terms_NN, np.ones((1, count)))
    return bootstrap.score(float(value[0]), np.concatenate(resampled), count)


def pair_terms(true_ND: np.ndarray, generated_ND: np.ndarray) -> np.ndarray:
    """[N, N] float64, k(x, x') + k(y, y') - k(x, y') - k(y, x') of every two pairs (x, y).

    The mean over different pairs is the unbiased estimate of Gretton et al. (2012), lemma 6. It
    holds also where x and y of a pair are dependent: an image and its reconstruction.

    Raises:
        ValueError: the shapes differ, or there are fewer than two images.
    """
    if true_ND.shape != generated_ND.shape or true_ND.ndim != 2 or len(true_ND) < 2:
        raise ValueError(
            f'expected two equal shapes [N >= 2, D], not {true_ND.shape} and {generated_ND.shape}'
        )
    x_ND, y_ND = true_ND.astype(np.float64), generated_ND.astype(np.float64)
    cross_NN = _kernel(x_ND, y_ND)
    return _kernel(x_ND, x_ND) + _kernel(y_ND, y_ND) - cross_NN - cross_NN.T


def _kernel(x_ND: np.ndarray, y_ND: np.ndarray) -> np.ndarray:
    return (x_ND @ y_ND.T / x_ND.shape[1] + 1) ** DEGREE


def _mean_over_pairs(terms_NN: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """[R] weighted means of the terms of two different images.

    An image that a resample holds twice is not compared with itself: the kernel of equal images
    exceeds that of different ones, which would bias the distance.
    """
    weights_RN = weights_RN.astype(np.float64)
    diagonal_N = np.diag(terms_NN)
    sums_R = ((weights_RN @ terms_NN) * weights_RN).sum(-1) - np.square(weights_RN) @ diagonal_N
    return sums_R / (np.square(weights_RN.sum(-1)) - np.square(weights_RN).sum(-1))
