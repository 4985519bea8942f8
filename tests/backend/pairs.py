import typing

import keras


class Pair(typing.NamedTuple):
    target: keras.Variable
    raw: keras.Variable
    residual: keras.Variable | None = None
