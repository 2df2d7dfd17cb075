import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the suite runs in the background


@pytest.fixture(autouse=True)
def one_thread():
    """Scripts set torch's threads; put one back after each test."""
    yield
    torch.set_num_threads(1)
