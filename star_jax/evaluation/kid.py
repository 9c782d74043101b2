"""How far apart are two sets of pictures to a network that was trained on photographs?

The kernel inception distance of Binkowski et al. (2018), on whatever features it is given: the
squared maximum mean discrepancy under the kernel (x . y / D + 1)^3. Unlike a Frechet distance it
has no bias in small sets, so that a few hundred pictures suffice.
"""

import numpy as np

from star_jax.evaluation import bootstrap
from star_jax.evaluation.bootstrap import Score

DEGREE = 3


def score(real_ND: np.ndarray, made_ND: np.ndarray, seed: int) -> Score:
    """The distance of features, image n of the second set being made for image n of the first.

    The interval is over pairs of images, drawn again with replacement. It is not taken over random
    subsets, as is usual: those share most of their images, and their mean varies too little.
    """
    surprise_NN = compare(real_ND, made_ND)
    count = len(surprise_NN)
    resampled = [
        _pairs_mean(surprise_NN, weights_RN[weights_RN.max(-1) < count])  # of one image: no pair
        for weights_RN in bootstrap.resamples(count, seed)
    ]
    value = _pairs_mean(surprise_NN, np.ones((1, count)))
    return bootstrap.interval(float(value[0]), np.concatenate(resampled), count)


def compare(real_ND: np.ndarray, made_ND: np.ndarray) -> np.ndarray:
    """[N, N] float64, k(x, x') + k(y, y') - k(x, y') - k(y, x') of every two pairs (x, y).

    The mean over different pairs is the unbiased estimate of Gretton et al. (2012), lemma 6, which
    also holds where x and y of a pair depend on each other: a picture and its reconstruction.
    Raises ValueError unless both have one shape and at least two images.
    """
    if real_ND.shape != made_ND.shape or real_ND.ndim != 2 or len(real_ND) < 2:
        raise ValueError(
            f'expected two equal shapes [N >= 2, D], not {real_ND.shape} and {made_ND.shape}'
        )
    x_ND, y_ND = real_ND.astype(np.float64), made_ND.astype(np.float64)
    cross_NN = _kernel(x_ND, y_ND)
    return _kernel(x_ND, x_ND) + _kernel(y_ND, y_ND) - cross_NN - cross_NN.T


def _kernel(x_ND: np.ndarray, y_ND: np.ndarray) -> np.ndarray:
    return (x_ND @ y_ND.T / x_ND.shape[1] + 1) ** DEGREE


def _pairs_mean(surprise_NN: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """[R] means over two different pairs, each as often as its weight says.

    An image that was drawn twice is not compared with itself: that would say how far the kernel of
    equal images lies from that of others, not how far the sets are.
    """
    weights_RN = weights_RN.astype(np.float64)
    diagonal_N = np.diag(surprise_NN)
    sums_R = ((weights_RN @ surprise_NN) * weights_RN).sum(-1) - np.square(weights_RN) @ diagonal_N
    return sums_R / (np.square(weights_RN.sum(-1)) - np.square(weights_RN).sum(-1))
