"""The formula of an average on JAX, compiled in two ways."""

import itertools

import numpy as np
import pytest
from frameworks import BACKEND

if BACKEND == "jax":
    import jax

    from polyak_model.backend.jax import update

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="is about JAX")
LIMITS = np.finfo("float32")
VALUES = [0.0, -0.0, LIMITS.smallest_subnormal, LIMITS.tiny, 0.1, -1.0, 3.0, LIMITS.max]
VALUES = [*VALUES, -LIMITS.max, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("name", ["_updated", "_updated_compensated"])
@pytest.mark.parametrize("weight", [0.0, 1e-3, 0.5, 0.7, 1.0])
def test_large_weights_are_updated_as_small_ones_bit_for_bit(name, weight, monkeypatch):
    w, a = np.array([*itertools.product(VALUES, VALUES)], "float32").T
    residuals = [a * 1e-8] if name == "_updated_compensated" else []
    formula = getattr(update, name)
    formula = getattr(formula, "__wrapped__", formula)
    results = []
    for large in (0, w.size):
        monkeypatch.setattr(update, "LARGE", large)
        updated = jax.jit(lambda *values: formula(*values))(weight, w, a, *residuals)
        results.append(np.asarray(updated).view("uint32"))
    np.testing.assert_array_equal(*results)
