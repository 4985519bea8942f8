"""What may be trained on several devices: checks of strategies, before anything changes."""

from keras import tree
import keras

from polyak_model import backend


def check_replicas(model, device):
    pass

def check_optimizers(model, arguments):
    pass
