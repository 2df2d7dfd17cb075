import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Scripts set torch's threads; put one back after each test."""
    yield
    torch.set_num_threads(1)
