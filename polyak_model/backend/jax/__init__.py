import jax
import keras

for _module, _oldest in ((jax, (0, 8)), (keras, (3, 12))):
    if tuple(map(int, _module.__version__.split(".")[:2])) < _oldest:
        raise ImportError(
            f"On JAX polyak_model needs {_module.__name__} {_oldest[0]}.{_oldest[1]} or later. "
            f"Received: {_module.__version__}. Run: pip install --upgrade {_module.__name__}"
        )
