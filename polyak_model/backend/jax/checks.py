"""What cannot be trained on JAX."""


def check_placement(model, device):
    if device is not None:
        raise ValueError(
            "`device` must be None on JAX, where one compiled step cannot reach across devices. "
            f"Received: device={device!r}. Leave `device` out; to spread weights and averages over "
            "several devices, use keras.distribution."
        )


def check_compilation(
    model, arguments, run_eagerly=False, jit_compile="auto", steps_per_execution=1, **_
):
    pass


def check_method(model, method):
    pass
