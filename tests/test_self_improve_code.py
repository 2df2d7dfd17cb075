"""The models of Hugging Face of self_improve.py: a random Qwen2 on disk goes the whole way."""
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import evaluate_checkpoints
import self_improve as S
from common import metrics
from common.files import UserError
from common.sandbox import Sandbox

CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
RIGHT = {"arithmetic": "def solve(s):\n    return eval(s)",
         "rpn": "def solve(s):\n    a = []\n    for t in s.split():\n        if t in '+-*//%':\n            y, x = a.pop(), a.pop()\n"
                "            a.append(eval(f'({x}){t}({y})'))\n        else:\n            a.append(int(t))\n    return a[0]",
         "brackets": "def solve(s):\n    while s != (s := s.replace('()', '').replace('[]', '').replace('{}', '')):\n"
                     "        pass\n    return s == ''"}
SMALL = ["--steps", "2", "--problems", "3", "--k", "2", "--updates", "3", "--batch-size", "4", "--n-test", "2", "--difficulty", "3-4",
         "--lora-rank", "4", "--device", "cpu", "--threads", "1"]


def problems(kind, d, n, seed=0):
    rng = np.random.default_rng(seed)
    return [S.as_problem(kind, S.KINDS[kind].draw(rng, d, None), d) for _ in range(n)]


SOME = [p for kind in S.KINDS for d in (1, 4, 7) for p in problems(kind, d, 3)]


def fenced(code):
    return f"```python\n{code}\n```"


def make_directory(folder, chat=True, hidden=32):
    """A random Qwen2 with a byte-pair tokenizer, and settings of generation that would spoil sampling."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|im_end|>", "<|im_start|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [S.question(p) for p in SOME] * 3 + [fenced(code) for code in RIGHT.values()] * 20
    tokenizer.train_from_iterator(texts, trainer)
    start = tokenizer.token_to_id("<|im_start|>")                           # a template of chat has it already
    tokenizer.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHAT if chat else None
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(fast), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=fast.eos_token_id, initializer_range=0.08))
    model.generation_config = transformers.GenerationConfig(do_sample=True, top_k=1, repetition_penalty=1.5,
                                                            eos_token_id=[fast.eos_token_id, 5])
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def code_model(folder, **settings):
    torch.manual_seed(1)
    return S.CodeModel(S.CodeConfig(folder, lora_rank=4, **settings), torch.device("cpu")).eval()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_directory(tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture(scope="module")
def model(directory):
    return code_model(directory)


@pytest.fixture(scope="module", autouse=True)
def short_replies():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S, "MAX_NEW", 24)
        patch.setattr(S, "PASS_K", 2)
        yield


@pytest.fixture(scope="module")
def run(directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("code") / "run"
    S.main([*SMALL, "--model", directory, "--out-dir", str(folder)])
    return folder


# ---- problems and programs

def test_a_programs_cases_are_pythons_own_and_no_constant_passes():
    for p in SOME:
        cases = S.cases_of(p)
        answers = [x.result for x in cases]
        assert cases[0] == p and len({x.line for x in cases}) == S.CASES and cases == S.cases_of.__wrapped__(p)
        assert max(answers.count(x) for x in answers) <= S.CASES // 2
        namespace = {}
        exec(RIGHT[p.kind], namespace)
        assert [namespace["solve"](x.argument) for x in cases] == answers


def test_the_cases_do_not_depend_on_the_words_of_the_question(monkeypatch):
    cases = S.cases_of(SOME[0])
    S.cases_of.cache_clear()
    monkeypatch.setattr(S, "question", lambda problem: "otherwise")
    assert S.cases_of(SOME[0]) == cases


def test_the_documents_difficulties():
    for d, operands in ((1, {2}), (4, {3, 4}), (6, {4, 5}), (8, {5, 6, 7}), (10, {7, 8, 9, 10})):
        some = problems("rpn", d, 300)
        assert {S.KINDS["rpn"].parts(p.line) + 1 for p in some} == operands
        assert ("%" in {t for p in some for t in p.line}) == (d > 4) and all(abs(int(p.answer)) <= 10**9 for p in some)
    assert {len(p.line) for p in problems("brackets", 1, 100)} == {4, 6, 8}
    assert {t for p in problems("brackets", 2, 200) if p.answer == "yes" for t in p.line} == {"(", ")"}


@pytest.mark.parametrize("reply, code", [
    ("def solve(s): pass", "def solve(s): pass"), ("Sure:\n```python\ndef solve(s): pass\n```\nDone.", "def solve(s): pass\n"),
    ("```\nx = 1\n```\n```py\ndef solve(s): pass\n```", "def solve(s): pass\n"), ("```python\ndef solve(s): pa", "def solve(s): pa"),
    ("```python\nprint(1)\n```", "```python\nprint(1)\n```")])
def test_code_is_taken_out_of_fenced_replies(reply, code):
    assert S.code_in(reply) == code


def test_counting_brackets_is_not_strict():
    counts = "def solve(s): return all(s.count(a) == s.count(b) for a, b in ('()', '[]', '{}'))"
    some = [p for d in range(1, 9) for p in problems("brackets", d, 5)]
    with Sandbox() as box:
        results = [box.run(counts, "solve", [(p.argument,) for p in S.cases_of(problem)]) for problem in some for p in [problem]]
    verdicts = [S.Program(p, counts, True, result).verdict for p, result in zip(some, results, strict=True)]
    assert verdicts.count("strict") <= 1                                    # one in 256 has no line with two that changed places


@pytest.mark.parametrize("kind", S.KINDS)
def test_verdicts_of_programs(kind):
    problem = problems(kind, 4, 1)[0]
    constant = f"def solve(s): return {problem.result!r}"
    wrong = f"def solve(s): return {problem.result!r} * 2 + 7"  # 9 is not True
    cases = [(p.argument,) for p in S.cases_of(problem)]
    with Sandbox() as box:
        for code, ended, verdict in ((RIGHT[kind], True, "strict"), (constant, True, "lucky"), (wrong, True, "wrong"),
                                     ("def solve(s): return 1 / 0", True, "failed"), ("def other(s): pass", True, "failed"),
                                     ("def solve(s)", True, "failed"), ("def solve(s):\n while 1: pass", True, "failed"),
                                     (RIGHT[kind], False, "truncated")):
            assert S.Program(problem, code, ended, box.run(code, "solve", cases)).verdict == verdict, code


# ---- the model

def test_greedy_alone_is_greedy_in_a_batch_and_sampling_is_seeded(model):
    together = model.write(SOME, 0.0, (0,))
    assert [model.write([p], 0.0, (0,))[0] for p in SOME] == together and len({reply for reply, _ in together}) > 3
    hot = {reply[:3] for reply, _ in model.write(SOME[:1] * 300, 9.9, (0,))}
    assert len(hot) > 60                                                   # all tokens, not the library's 50 likeliest
    a, b, c = (model.write(SOME[:9], 1.0, (seed,)) for seed in (1, 1, 2))
    assert a == b != c and len({reply for reply, _ in a}) > 5           # not with the directory's own top_k = 1


def test_greedy_is_the_models_own_argmax(model):
    reply, ended = model.write(SOME[:1], 0.0, (0,))[0]
    prompt = model.prompt(SOME[0].kind, SOME[0].line)
    tokens = [*prompt]
    while len(tokens) < len(prompt) + S.MAX_NEW and (len(tokens) == len(prompt) or tokens[-1] not in model.stops):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert (tokens[-1] in model.stops) == ended and model.stops == {model.tokenizer.eos_token_id, 5}
    assert model.tokenizer.decode(tokens[len(prompt):len(tokens) - ended], skip_special_tokens=True) == reply


def test_the_end_of_a_reply_is_in_the_loss_and_the_padding_is_not(model):
    short, long = (model.example("rpn", SOME[9].line, (text,)) for text in ("def", fenced(RIGHT["rpn"])))
    assert model.tokenizer.decode(short[0][:short[1]]).endswith("assistant\n")
    assert model.tokenizer.decode(short[0][short[1]:]) == "def<|im_end|>"
    logp = model(torch.tensor([short[0]]))[0, :-1].log_softmax(-1)
    own = -logp[torch.arange(len(short[0]) - 1), torch.tensor(short[0][1:])][short[1] - 1:]
    assert S.batch_loss(model, [short]).item() == pytest.approx(float(own.mean().detach()), rel=1e-4)
    n = [len(tokens) - start for tokens, start in (short, long)]
    both = sum(S.batch_loss(model, [x]).item() * k for x, k in zip((short, long), n, strict=True)) / sum(n)
    assert S.batch_loss(model, [short, long]).item() == pytest.approx(both, rel=1e-4)


def test_the_prompt_is_a_chat_where_the_model_has_one(model, tmp_path):
    text = S.question(SOME[0])
    assert model.tokenizer.decode(model.prompt(SOME[0].kind, SOME[0].line)) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    plain = code_model(make_directory(tmp_path / "plain", chat=False))
    assert plain.tokenizer.decode(plain.prompt(SOME[0].kind, SOME[0].line)) == "<|im_start|>" + text + "\n"


def test_only_the_adapter_learns_and_only_it_is_saved(model):
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    assert sum(x.numel() for x in model.state().values()) == S.count_parameters(model, trainable=True)
    assert model.lm.peft_config["default"].r == 4 and model.lm.peft_config["default"].lora_alpha == 8


def test_the_revision_is_asked_for_and_no_code_of_the_model_is_run(directory, monkeypatch):
    asked, load = [], transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **more: (asked.append(more), load(*args, **more))[1])
    code_model(directory, revision="v2")
    assert asked[0]["revision"] == "v2" and asked[0]["trust_remote_code"] is False


# ---- the loop

def test_a_run_goes_the_whole_way_and_its_state_gives_equal_outputs(run, directory):
    rows = metrics.read(run)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[1]["sampled"] == 18
    assert sum(rows[1][name] for name in S.VERDICTS) == 18 and 0 <= rows[1]["share_truncated"] <= 1
    trained, saved = S.load_model(run / "last.pt")
    assert saved["config"]["base"] == directory and all("lora_" in name for name in saved["model"])
    again, _ = S.load_model(run / "checkpoints" / "iter_2.pt")
    tokens = torch.tensor([trained.prompt(SOME[0].kind, SOME[0].line)])
    assert torch.equal(trained(tokens), again(tokens))
    assert {x["kind"] for x in map(json.loads, (run / "test.jsonl").read_text().splitlines())} == set(S.KINDS)


def test_what_passes_is_trained_on_and_changes_the_model(directory, tmp_path, monkeypatch):
    def write(self, some, temperature, seed):
        return [(fenced(RIGHT[p.kind]), True) for p in some]
    monkeypatch.setattr(S.CodeModel, "write", write)
    out = S.main([*SMALL, "--model", directory, "--out-dir", str(tmp_path / "run"), "--lr", "1e-2"])
    rows = metrics.read(tmp_path / "run")
    assert out["test_accuracy"] == 1 and rows[1]["strict"] == 18 and rows[2]["loss"] < rows[1]["loss"]
    first, last = (torch.load(tmp_path / "run" / "checkpoints" / f"iter_{i}.pt", weights_only=True)["model"] for i in (0, 2))
    assert all(not torch.equal(first[name], last[name]) for name in first)
    kept = [json.loads(x) for x in (tmp_path / "run" / "solutions" / "iter_1.jsonl").read_text().splitlines()]
    assert {x["steps"][0][1] for x in kept} == {fenced(code) for code in RIGHT.values()}


def test_resume_is_bit_exact(run, directory, tmp_path):
    whole = [line.rsplit(",", 1)[0] for line in (run / "metrics.csv").read_text().splitlines()]
    S.main([*SMALL, "--model", directory, "--max-minutes", "1e-6", "--out-dir", str(tmp_path / "run")])
    S.main(["--resume", str(tmp_path / "run")])
    assert [line.rsplit(",", 1)[0] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()] == whole


def test_without_a_solution_the_run_ends_early_with_its_reason(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(S.CodeModel, "write", lambda self, some, *rest: [("no", True) for _ in some])
    out = S.main([*SMALL, "--model", directory, "--steps", "9", "--out-dir", str(tmp_path / "run")])
    assert out["steps"] == S.IDLE and out["stopped_early"] and out["ended"] == f"no solution passed in {S.IDLE} iterations"
    assert "ended after iteration 3: no solution passed" in capsys.readouterr().out


def test_export_is_the_trained_model_without_an_adapter(run, tmp_path, capsys):
    S.main(["--checkpoint", str(run), "--export", str(tmp_path / "merged"), "--threads", "1"])
    trained, _ = S.load_model(run)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompt = torch.tensor([trained.prompt(SOME[0].kind, SOME[0].line)])
    assert torch.allclose(merged(prompt).logits, trained(prompt), atol=1e-5) and tokenizer.chat_template == CHAT
    short = merged.generate(prompt, max_new_tokens=40, do_sample=False)
    assert merged.generation_config.eos_token_id == [tokenizer.eos_token_id, 5]
    assert not {tokenizer.eos_token_id, 5} & {*short[0, prompt.shape[1]:-1].tolist()}
    with pytest.raises(SystemExit, match="exists"):
        S.main(["--checkpoint", str(run), "--export", str(tmp_path / "merged"), "--threads", "1"])


def test_a_trained_model_is_used_and_evaluated(run, capsys):
    assert S.main(["--solve", "3 4 + 2 *", "--kind", "rpn", "--checkpoint", str(run), "--threads", "1"])["verdict"] in S.VERDICTS
    assert S.load(run)("( ) ]", "brackets") is None                        # it cannot write a program
    evaluate_checkpoints.main([str(run), "--threads", "1"])
    assert "difficulty 3-7" in capsys.readouterr().out


# ---- bad input

def test_an_adapter_is_refused_with_a_missing_key_or_another_base(run, directory, tmp_path):
    saved = torch.load(run / "best.pt", weights_only=True)
    short = {**saved, "model": dict([*saved["model"].items()][1:])}
    torch.save(short, tmp_path / "short.pt")
    with pytest.raises(UserError, match="missing, or of another shape"):
        S.load(tmp_path / "short.pt")
    torch.save({**saved, "model": {name: x * torch.nan for name, x in saved["model"].items()}}, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="not finite"):
        S.load(tmp_path / "nan.pt")
    other = make_directory(tmp_path / "other")
    state = transformers.AutoModelForCausalLM.from_pretrained(other)
    torch.nn.init.normal_(state.model.norm.weight)
    state.save_pretrained(other)
    torch.save({**saved, "config": {**saved["config"], "base": other}}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="not those that the adapter was trained with"):
        S.load(tmp_path / "foreign.pt")


@pytest.mark.parametrize("flags, named", [
    ("--model MODEL --width 32", "--width"), ("--lora-rank 4", "--lora-rank"), ("--model MODEL --control corpus", "corpus"),
    ("--model ''", "empty"), ("--model MODEL --lora-targets wings,q_proj", "no module wings"), ("--model MODEL --lora-targets norm", "Target module"), ("--model nowhere/at/all", "--model nowhere/at/all"),
    ("--model BARE", "--model"), ("--model ENDLESS", "ends a text"), ("--export x --checkpoint TINY", "no adapter to merge"),
    ("--export x", "--checkpoint"), ("--model MODEL --resume RUN", None), ("--resume RUN --model tiny", "--model"),
    ("--init-from TINY --model MODEL", "its model is")])
def test_bad_flags_end_in_one_line(run, directory, tmp_path, capsys, monkeypatch, flags, named):
    import shlex
    work = tmp_path / "work"
    work.mkdir()
    for name in ("bare", "endless"):
        shutil.copytree(directory, tmp_path / name)
    for file in (tmp_path / "bare").glob("token*"):
        file.unlink()
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    fast.eos_token = None
    fast.save_pretrained(tmp_path / "endless")
    monkeypatch.chdir(work)
    tiny = S.Path(S.__file__).parent / "logs" / "kept" / "self_improve" / "compare-s10-off"
    for word, to in (("MODEL", directory), ("BARE", tmp_path / "bare"), ("ENDLESS", tmp_path / "endless"), ("RUN", run), ("TINY", tiny)):
        flags = flags.replace(word, str(to))
    if named is None:
        return S.main(shlex.split(flags)) and None                         # what it was started with may be said again
    with pytest.raises(SystemExit) as e:
        S.main(shlex.split(flags))
    message = capsys.readouterr().err if e.value.code == 2 else str(e.value.code)
    assert named in message and message.strip().count("\n") == 0 and not list(work.iterdir())


def test_a_directory_that_is_damaged_is_one_line(directory, tmp_path):
    def damaged(name, change):
        folder = tmp_path / name
        shutil.copytree(directory, folder)
        change(folder)
        with pytest.raises(UserError, match=f"--model {folder}: cannot be used: .") as e:
            code_model(str(folder))
        return str(e.value)

    def with_weights(change):
        def save(folder):
            weights = safetensors.torch.load_file(folder / "model.safetensors")
            safetensors.torch.save_file(change(weights), folder / "model.safetensors", {"format": "pt"})
        return save

    def bad_template(folder):
        fast = transformers.AutoTokenizer.from_pretrained(folder)
        fast.chat_template = "{{ raise_exception('no such role') }}"
        fast.save_pretrained(folder)
    half = (tmp_path / "half", lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:999]))
    assert damaged(*half)
    assert "is missing" in damaged("less", with_weights(lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k}))
    assert "not finite" in damaged("nan", with_weights(lambda w: {k: v * torch.nan for k, v in w.items()}))
    assert "no such role" in damaged("template", bad_template)


# ---- does it learn?

@pytest.mark.slow
def test_a_model_that_is_right_by_half_improves_by_its_strict_solutions_and_not_by_right_examples(tmp_path, monkeypatch):
    """The base was taught the right program, and as often `return 14` (the question's own answer)."""
    monkeypatch.setattr(S, "MAX_NEW", 120)
    base = make_directory(tmp_path / "base", hidden=64)
    lm = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = code_model(base)
    model.lm = lm                                                            # all of it learns
    optimizer, rng = torch.optim.AdamW(lm.parameters(), 3e-3), np.random.default_rng(0)
    for step in range(400):
        batch = []
        for _ in range(16):
            p = model.problem(rng, str(rng.choice([*S.KINDS])), int(rng.integers(1, 8)))
            code = RIGHT[p.kind] if rng.random() < 0.5 else f"def solve(s):\n    return {p.result!r}"
            batch.append(model.example(p.kind, p.line, (fenced(code),)))
        S.update(model, optimizer, [batch], [3e-3 * min(1, (400 - step) / 200)])
    lm.save_pretrained(base)
    out = {}
    for control in ("off", "outcome"):
        out[control] = S.main(["--model", base, "--steps", "3", "--problems", "10", "--updates", "30", "--lr", "2e-3", "--device", "cpu", "--threads", "1",
                               "--control", control, "--out-dir", str(tmp_path / control)])
    print({name: (x["test_accuracy_before"], x["test_accuracy"], x["test_verdicts"], x["pass_before"], x["pass_now"]) for name, x in out.items()})
    assert out["off"]["test_accuracy"] > 0.9 and out["off"]["pass_now"]["pass@1"] > out["off"]["pass_before"]["pass@1"] + 0.2
    assert out["outcome"]["pass_now"]["pass@1"] < out["off"]["pass_now"]["pass@1"] - 0.2
