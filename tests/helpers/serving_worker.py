"""Loads what was shipped where polyak_model cannot be imported; run by test_shipping.py."""

import pathlib
import pickle
import sys

import keras
import numpy as np
import tensorflow as tf


def make_net():
    """Makes a net with statistics, dropout and penalties."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="relu", kernel_regularizer="l2"),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, activation="softmax", activity_regularizer="l2"),
        ]
    )


def serve(path, x):
    """Asks a SavedModel, and tells of its graph and of what its folder holds."""
    loaded = tf.saved_model.load(path)
    answer = loaded.serve(tf.nest.map_structure(tf.constant, x))
    graph = loaded.signatures["serve"].graph.as_graph_def()
    functions = [node for function in graph.library.function for node in function.node_def]
    shapes = tf.train.load_checkpoint(path / "variables" / "variables").get_variable_to_shape_map()
    del shapes["_CHECKPOINTABLE_OBJECT_GRAPH"]
    return {
        "answer": tf.nest.map_structure(np.asarray, answer),
        "assigns": [node.op for node in [*graph.node, *functions] if "Assign" in node.op],
        # Keras lists the weights of a model, and again those that the graph uses.
        "weights": sorted(shape for key, shape in shapes.items() if key.startswith("variables/")),
        "used": sorted(shape for key, shape in shapes.items() if key.startswith("_all_variables/")),
        "others": sorted(k for k in shapes if not k.startswith(("variables/", "_all_variables/"))),
    }


def run_lite(path, x):
    """Asks a LiteRT model."""
    ask = tf.lite.Interpreter(model_path=str(path)).get_signature_runner()
    (name,) = ask.get_input_details()
    (answer,) = ask(**{name: x}).values()
    return answer


def run_onnx(path, x):
    """Asks an ONNX model, and tells how many values it holds."""
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (answer,) = session.run(None, {session.get_inputs()[0].name: x})
    constants = [onnx.numpy_helper.to_array(c) for c in onnx.load(path).graph.initializer]
    return {"answer": answer, "values": sum(np.size(constant) for constant in constants)}


def main(folder):
    """Loads all files of a folder, and writes what they answer to one."""
    shipped = pickle.loads((folder / "shipped.pickle").read_bytes())
    x, y = shipped["data"]
    loaded = keras.models.load_model(folder / "average.keras")
    weighted = make_net()
    weighted.load_weights(folder / "average.weights.h5")
    results = {
        "loaded": loaded.predict(x, verbose=0),
        "evaluated": loaded.evaluate(x, y, verbose=0),
        "weighted": np.asarray(tf.function(weighted)(x)),
        "served": {name: serve(folder / name, given) for name, given in shipped["served"].items()},
        "lite": [run_lite(path, x) for path in sorted(folder.glob("*.tflite"))],
        "onnx": [run_onnx(path, x) for path in sorted(folder.glob("*.onnx"))],
    }
    (folder / "results.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    sys.modules["polyak_model"] = None  # Python then refuses to import it.
    try:
        import polyak_model  # noqa: F401
    except ImportError:
        main(pathlib.Path(sys.argv[1]))
    else:
        sys.exit("polyak_model can be imported")
