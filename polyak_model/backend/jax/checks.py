"""What cannot be trained on JAX."""

import keras


def check_placement(model, device):
    if device is not None:
        raise ValueError(
            "`device` must be None on JAX, where one compiled step cannot reach across devices. "
            f"Received: device={device!r}. Leave `device` out; to spread weights and averages over "
            "several devices, use keras.distribution."
        )
    layouts = [variable._layout for variable in model.variables]
    if any(layouts) and keras.distribution.distribution() is None:
        raise ValueError(
            "The average of a model is spread over devices by the distribution of the model, which "
            f"must still be set. Received: the model '{model.name}', created under a distribution, "
            "and none is set now; `keras.utils.clear_session()` drops it. Call "
            "keras.distribution.set_distribution(...) again first."
        )


def check_compilation(
    model, arguments, run_eagerly=False, jit_compile="auto", steps_per_execution=1, **_
):
    pass


def check_method(model, method):
    pass
