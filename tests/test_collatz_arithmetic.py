"""The vectorised arithmetic of collatz.py against Python integers, and its data against the original's."""
import hashlib
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import collatz
from common.files import UserError

SPECIAL = [1, 3, 27, 2**16 + 1, 2**32 - 1, 2**32 + 1, 2**64 - 1, 2**128 - 1, (4**63 - 1) // 3, (2**97 - 1) // 3 * 2 + 1,
           2**2000 - 1]
odd = st.integers(2, 300).flatmap(lambda bits: st.integers(2 ** (bits - 1), 2**bits - 1)).map(lambda n: n | 1)


def from_limbs(limbs):
    return [sum(int(x) << 32 * i for i, x in enumerate(column)) for column in limbs.T.tolist()]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(odd, min_size=1, max_size=20), st.integers(1, 60))
@example(SPECIAL, 50)
def test_paths_equal_python_integers(numbers, m):
    p = collatz.paths(collatz.to_limbs(numbers), m)
    assert from_limbs(collatz.to_limbs(numbers)) == numbers
    for i, n in enumerate(numbers):
        for j in range(m + 1):
            assert p.res[i, j] == n % collatz.RESIDUE
            assert p.lg[i, j] == pytest.approx(math.log2(n), rel=1e-14, abs=1e-12)
            if j < m:
                n, k = collatz.syracuse(n)
                assert p.k[i, j] == k


def test_a_huge_number_comes_down_to_1_exactly():
    n = 2**1100 - 1  # climbs to 1743 bits, beyond a float's range, and falls through all of it
    steps = len(collatz.trajectory(n)) - 1
    p = collatz.paths(collatz.to_limbs([n]), steps + 3)
    assert p.lg[0, steps] == pytest.approx(0, abs=1e-9) and p.lg[0, steps - 1] > 1
    assert (p.k[0, steps:] == 2).all() and (p.res[0, steps:] == 1).all()


def test_fingerprint_follows_the_map():
    limbs = collatz.random_odd(np.random.default_rng(0), 50, 2, 200)
    keys = collatz.fingerprint(limbs, collatz.k_sequence(limbs, 20))
    for n, row in zip(from_limbs(limbs), keys.tolist(), strict=True):
        for key in row:
            assert key == (n % 2147483647) << 31 | n % 2147483629
            n, _ = collatz.syracuse(n)


def test_random_odd_has_uniform_bit_lengths():
    numbers = from_limbs(collatz.random_odd(np.random.default_rng(1), 20_000, 2))
    assert all(n % 2 == 1 and n > 1 for n in numbers)
    bits = np.bincount([n.bit_length() for n in numbers], minlength=129)
    assert bits[:2].sum() == 0 and bits[2:].min() > 100 and bits[2:].max() < 220  # 157 expected each
    assert abs(np.mean([n >> 1 & 1 for n in numbers if n.bit_length() > 3]) - 0.5) < 0.02


def test_eval_set_is_the_original_one():
    numbers = collatz.eval_numbers()
    digest = hashlib.sha256("\n".join(map(str, numbers)).encode()).hexdigest()
    assert digest == "a2d3a96262ffaee451e45ee1c5e359595e5664e18d85e3ae5c0e223e2073c969"
    assert len(set(numbers)) == 50_000


def test_make_eval_writes_what_read_eval_verifies(tmp_path, monkeypatch):
    numbers = [27, *collatz.eval_numbers(rows=300)]
    monkeypatch.setattr(collatz, "eval_numbers", lambda: numbers)
    path = tmp_path / "eval.csv"
    collatz.make_eval_csv(str(path))
    header, first = path.read_text().splitlines()[:2]
    assert header == "n,t1,is_growth,sigma_n,max_n,w_expansion"
    # 111 steps with the halvings, maximum 9232: Lagarias 1985
    assert first == f"27,41,True,111,9232,{1 + math.log10(9232 / 27):.4f}"
    rows, memory = collatz.read_eval_csv(str(path)), collatz.default_rows()
    assert from_limbs(rows[0]) == from_limbs(memory[0]) == numbers
    assert np.abs(rows[1] - memory[1]).max() <= 1e-4 + 1e-12  # both round to 4 decimals
    with pytest.raises(UserError, match="--make-eval"):
        collatz.read_eval_csv(str(tmp_path / "none.csv"))


HEADER = "n,t1,is_growth,sigma_n,max_n,w_expansion\n"
GOOD = "27,41,True,111,9232,3.5\n"


@pytest.mark.parametrize("text, message", [
    ("", "no column 'n'"),
    (HEADER, "no rows"),
    (HEADER.replace("is_growth,", "") + "27,41,111,9232,3.5\n", "no column 'is_growth'"),
    (HEADER + "27,43,True,111,9232,3.5\n", r"line 2: t1 is '43', but T\(27\) = 41"),
    (HEADER + GOOD + GOOD, "line 3: 27 stands there twice"),
    (HEADER + "27,41,True,111,9232,nan\n", "line 2: w_expansion 'nan' is not a number"),
    (HEADER + "27,41,True,111,9232,-2\n", "w_expansion -2 is not >= 1"),
    (HEADER + "28,7,False,18,52,1.0\n", "'28' is not an odd number"),
    (HEADER + "٢٧,41,True,111,9232,3.5\n", "line 2: n"),
    (HEADER + "27,٤١,True,111,9232,3.5\n", "line 2: t1"),
    (HEADER + "27,41\n", "line 2: is_growth"),
    (HEADER + "27,41,False,111,9232,3.5\n", "is_growth is 'False'"),
    (HEADER + '"' + GOOD * 9000, "line 1: field larger"),  # one stray quote: all that follows is one cell
    (HEADER + "\xff\xfe27,41,True,111,9232,3.5\n", "line 2"),
])
def test_bad_eval_csv_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode("latin-1") if "\xff" in text else text.encode())
    with pytest.raises(UserError, match=message) as e:
        collatz.read_eval_csv(str(path))
    assert "\n" not in str(e.value)


def test_residue_statistics_of_mod_3():
    # n = (3m + 1) / 2^k is 1 mod 3 iff k is even: P = 1/3, so relative to uniform 0, 1, 2; P(k = 1 | odd) = 3/4
    s = collatz.residue_statistics(1)
    assert s[1, 0] == pytest.approx(0.0, abs=1e-6) and s[2, 0] == pytest.approx(0.5) and s[0, 0] == -2
    assert s[2, 1] == pytest.approx(0.75) and s[1, 2] == pytest.approx(0.75) and s[1, 1] == s[2, 2] == 0
    # E[k | odd] = 5/3, E[k | even] = 8/3
    assert s[2, 3] == pytest.approx((math.log2(3) - 5 / 3) / 2) and s[1, 3] == pytest.approx((math.log2(3) - 8 / 3) / 2)
    assert (collatz.residue_statistics(0) == 0).all() and collatz.residue_statistics(0).shape == (1, 3)


def test_residue_statistics_agree_with_trajectories():
    limbs = collatz.random_odd(np.random.default_rng(3), 2000, 400, 400)
    p = collatz.paths(limbs, 200)  # long before 1
    node, k = p.res[:, 21:] % 27, p.k[:, 20:]  # and the k that led to it
    s = collatz.residue_statistics(3)
    for r in (1, 2, 4, 5, 25, 26):
        here = node == r
        assert here.mean() * 27 == pytest.approx(2 ** (2 * s[r, 0]), rel=0.08)
        assert (k[here] == 1).mean() == pytest.approx(s[r, 1], abs=0.03)


def test_lower_bound_of_the_notes():
    assert [round(100 * collatz.lower_bound(m), 2) for m in (10, 20, 30)] == [1.51, 0.39, 0.14]
    assert collatz.lower_bound(1) == pytest.approx((1 / 4 + 2 / 8) / 2)  # k1 + k2 <= 3 : 11, 12, 21
