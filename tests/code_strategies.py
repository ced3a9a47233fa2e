"""Matrices that can be coded, for property tests: any finite weights, and normal ones of any magnitude."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ebbflow.common.codes import quantise

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3)).map(lambda shape: (shape[0], shape[1] * 32))
WEIGHTS = SHAPES.flatmap(
    lambda shape: hnp.arrays(
        np.float32,
        shape,
        elements=st.floats(-quantise.WEIGHT_MOST, quantise.WEIGHT_MOST, width=32, allow_subnormal=True),
    )
) | st.builds(
    lambda shape, exponent, seed: (np.random.default_rng(seed).standard_normal(shape) * 2.0**exponent).astype(
        np.float32
    ),
    SHAPES,
    st.integers(-40, 15),
    st.integers(0, 1000),
)
