"""Wrong inputs over all jobs: what is given, and what the refusal must say.

Plain data, read by `test_bad_inputs.py`. In arguments, files and expected words, TMP is a scratch
folder of the case in which nothing may appear, and WORLD a folder with what a user has prepared
(see `test_bad_inputs.world`): model/, store/, ledger.sqlite, rows.parquet, a finished run in run/,
and the settings files train.yaml, sweep.yaml, price.yaml, els.yaml, plan.yaml and so on.

Every refusal must name the *field* (or option, or file), the *value* and the *remedy*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SECRET = "hunter2-is-secret"


@dataclass(frozen=True)
class BadInput:
    """One wrong input."""

    job: str
    """Stem of a file in jobs/."""
    arguments: Sequence[str]
    field: str
    """What is wrong, as the user knows it."""
    value: str
    """What was given, or what was found."""
    remedy: str
    """What to do."""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Written before the job starts: name -> content. A content ending in "/" makes a folder."""
    as_process: bool = False
    """The sample of its job that also runs as a process of its own."""
    needs_permissions: bool = False
    """Root may read and write everywhere, so that root cannot see this refusal."""


def bad(job: str, arguments: str, field: str, value: str, remedy: str, **more: Any) -> BadInput:
    """Returns a wrong input whose arguments are separated by blanks."""
    return BadInput(job, arguments.split(), field, value, remedy, **more)


PRICE = "--config WORLD/price.yaml"
TRAIN = "--config WORLD/train.yaml --output TMP/out"
SWEEP = "--config WORLD/sweep.yaml --output TMP/out"
STORING = "--config WORLD/prepare.yaml --data.store TMP/store"
PREPARE = f"{STORING} --data.ledger sqlite:///TMP/l.sqlite"
PLAN = "--config WORLD/plan.yaml"
MEAN = "--config WORLD/mean_estimation.yaml --output TMP/out"
STUDY = "--config WORLD/study.yaml --output TMP/out"
SCALE = "--config WORLD/scale.yaml --output TMP/out"
BENCHMARK = "--config WORLD/benchmark.yaml --output TMP/out"
PRETRAIN = "--input WORLD/public.parquet --output TMP/out"
LEDGER = "--ledger sqlite:///WORLD/ledger.sqlite --dataset test-users"
DEMO = "--config WORLD/train.yaml --output TMP/demo/private"
AUDIT = "--config WORLD/train.yaml --output TMP/out"

AUDITS = {
    "an audit without canaries": bad(
        "audit", f"{AUDIT} --audit.canary_users 0", "audit.canary_users", "0", "greater than 0",
        as_process=True,
    ),
    "more guesses than canaries": bad(
        "audit", f"{AUDIT} --audit.canary_users 10 --audit.guesses 11", "audit.guesses", "11",
        "at most one guess per canary",
    ),
    "an audit with full confidence": bad(
        "audit", f"{AUDIT} --audit.confidence 1", "audit.confidence", "1", "less than 1",
    ),
    "an audit with less confidence than a coin": bad(
        "audit", f"{AUDIT} --audit.confidence 0.2", "audit.confidence", "0.2",
        "greater than or equal to 0.5",
    ),
    "canaries without texts": bad(
        "audit", f"{AUDIT} --audit.texts_per_canary 0", "audit.texts_per_canary", "0",
        "greater than 0",
    ),
    "texts of canaries without tokens": bad(
        "audit", f"{AUDIT} --audit.text_tokens -1", "audit.text_tokens", "-1", "greater than 0",
    ),
    "canaries that write poems": bad(
        "audit", f"{AUDIT} --audit.canary_text poems", "audit.canary_text", "poems",
        "'random', 'rare' or 'sampled'",
    ),
    "an audit from a negative seed": bad(
        "audit", f"{AUDIT} --audit.seed -1", "audit.seed", "-1", "greater than or equal to 0",
    ),
    "an audit of a box of another colour": bad(
        "audit", f"{AUDIT} --audit.box grey", "audit.box", "grey", "'white' or 'black'",
    ),
    "an audit without a clip norm": bad(
        "audit",
        f"{AUDIT} --privacy.noise_multiplier 0 --privacy.accept_no_guarantee true"
        " --privacy.clip_norm inf",
        "privacy.clip_norm", "infinite", "give a finite privacy.clip_norm",
    ),
    "an audit of a run and of a file": bad(
        "audit", f"{AUDIT} --of WORLD/run", "--of", "--config", "leave --config out",
    ),
    "an audit of a run without settings": bad(
        "audit", "--of WORLD/run --output TMP/out", "--of", "WORLD/run", "give the output folder",
    ),
    "an audit in a folder that is not empty": bad(
        "audit", "--config WORLD/train.yaml --output WORLD/run", "output", "WORLD/run",
        "give another folder",
    ),
    "canaries in a run that is no audit": bad(
        "train", f"{TRAIN} --audit.canary_users 5", "--audit.canary_users", "5", "--help",
    ),
    "canaries that a truncated cohort has no room for": bad(
        "audit",
        f"{AUDIT} --privacy.max_cohort_size 60 --privacy.population 100 --audit.canary_users 100",
        "privacy.population", "100", "raise it, or take fewer canaries",
    ),
}  # fmt: skip

FILES = {
    "a settings file that is missing": bad(
        "price", "--config TMP/none.yaml", "--config", "none.yaml", "give a readable",
        as_process=True,
    ),
    "a settings file that is a folder": bad(
        "price", "--config WORLD/model", "--config", "WORLD/model", "give a readable",
    ),
    "malformed YAML": bad(
        "price", "--config TMP/a.yaml", "TMP/a.yaml", "line 1", "correct it there",
        files={"a.yaml": "privacy: [1, 2"},
    ),
    "YAML that is a list": bad(
        "train", "--config TMP/a.yaml", "--config", "a.yaml", "write sections",
        files={"a.yaml": "- privacy\n- data\n"},
    ),
    "YAML that is a number": bad(
        "sweep", "--config TMP/a.yaml", "--config", "a.yaml", "write sections",
        files={"a.yaml": "7"},
    ),
    "an empty settings file": bad(
        "train", "--config TMP/a.yaml", "--config", "a.yaml", "write sections",
        files={"a.yaml": ""},
    ),
    "a key given twice": bad(
        "price", "--config TMP/a.yaml", "a.yaml", "'epsilon' is given twice", "(line 4)",
        files={"a.yaml": "privacy:\n  epsilon: 1\n  delta: 1e-6\n  epsilon: 8\n"},
    ),
    "a section given twice": bad(
        "train", "--config TMP/a.yaml", "a.yaml", "'privacy' is given twice", "keep one",
        files={"a.yaml": "privacy: {epsilon: 1}\ndata: {name: x}\nprivacy: {epsilon: 8}\n"},
    ),
    "two settings files": bad(
        "train", "--config WORLD/train.yaml --config WORLD/price.yaml", "--config", "2 times",
        "keep one",
    ),
    "settings that are not UTF-8": bad(
        "prepare", "--config TMP/a.yaml", "--config", "a.yaml", "save it as UTF-8",
        files={"a.yaml": b"data: {name: caf\xe9}\n"},
    ),
    "settings that are binary": bad(
        "price", "--config WORLD/rows.parquet", "--config", "rows.parquet", "UTF-8",
    ),
    "a YAML tag that would run code": bad(
        "price", "--config TMP/a.yaml", "a.yaml", "python/object", "correct it",
        files={"a.yaml": "privacy: !!python/object/apply:os.getcwd []\n"},
    ),
    "an impossible date": bad(
        "price", "--config TMP/a.yaml", "a.yaml", "month must be in 1..12", "correct it",
        files={"a.yaml": "privacy: {delta: 2020-99-99}\n"},
    ),
    "YAML nested without end": bad(
        "price", "--config TMP/a.yaml", "--config", "a.yaml", "correct it",
        files={"a.yaml": "[" * 5000},
    ),
    "an unknown section, near a known one": bad(
        "train", "--config TMP/a.yaml", "'privcy'", "did you mean privacy?", "known are",
        files={"a.yaml": "privcy: {epsilon: 1}\n"},
    ),
    "an unknown field, near a known one": bad(
        "price", "--config TMP/a.yaml", "privacy.clip_nrom", "did you mean privacy.clip_norm?",
        "--help", files={"a.yaml": "privacy: {clip_nrom: 1, epsilon: 1, delta: 1e-6}\n"},
    ),
    "an unknown field deep in a list": bad(
        "mean_estimation", "--config TMP/a.yaml --output TMP/out", "study.num_user",
        "did you mean study.num_users?", "--help", files={"a.yaml": "study: {num_user: 10}\n"},
    ),
    "a section that is a list": bad(
        "train", "--config TMP/a.yaml", "'data'", "[1, 2]", "name: value",
        files={"a.yaml": "privacy: {}\ndata: [1, 2]\n"},
    ),
    "a section that is empty": bad(
        "price", "--config TMP/a.yaml", "'privacy'", "is null", "name: value",
        files={"a.yaml": "privacy:\n"},
    ),
    "no settings at all": bad("train", "", "'privacy'", "is missing", "give it"),
    "a settings file that may not be read": bad(
        "price", "--config WORLD/closed.yaml", "--config", "closed.yaml", "give a readable",
        needs_permissions=True,
    ),
}  # fmt: skip

PRICES = {
    "an unknown option, near a known one": bad(
        "price", f"{PRICE} --privacy.clip-norm 1", "--privacy.clip-norm",
        "did you mean --privacy.clip_norm?", "--help",
    ),
    "an option without its value": bad(
        "price", f"{PRICE} --privacy.epsilon", "--privacy.epsilon", "argument", "--help",
    ),
    "an option given twice": bad(
        "price", f"{PRICE} --privacy.epsilon 1 --privacy.epsilon 2", "--privacy.epsilon", "2 times",
        "keep one",
    ),
    "a stray word": bad("price", f"{PRICE} epsilon=8", "epsilon=8", "unrecognized", "--help"),
    "two targets": bad(
        "price", f"{PRICE} --privacy.noise_multiplier 1", "privacy.noise_multiplier",
        "privacy.epsilon", "exactly one",
    ),
    "no target": bad(
        "price", f"{PRICE} --privacy.epsilon null", "privacy.epsilon", "noise_multiplier",
        "give exactly one",
    ),
    "a budget of zero": bad(
        "price", f"{PRICE} --privacy.epsilon 0", "privacy.epsilon", "'0'", "greater than 0",
    ),
    "an epsilon that is not a number": bad(
        "price", f"{PRICE} --privacy.epsilon nan", "privacy.epsilon", "'nan'", "finite",
    ),
    "an infinite epsilon": bad(
        "price", f"{PRICE} --privacy.epsilon inf", "privacy.epsilon", "'inf'", "finite",
    ),
    "an epsilon in words": bad(
        "price", f"{PRICE} --privacy.epsilon eight", "privacy.epsilon", "'eight'", "number",
    ),
    "a delta of one": bad(
        "price", f"{PRICE} --privacy.delta 1", "privacy.delta", "'1'", "less than 1",
    ),
    "a negative delta": bad(
        "price", f"{PRICE} --privacy.delta -1e-6", "privacy.delta", "'-1e-6'", "greater than 0",
    ),
    "a delta of 1/N": bad(
        "price", f"{PRICE} --privacy.delta 1e-4", "privacy.delta", "0.0001", "lower it",
    ),
    "a delta that is missing": bad(
        "price", "--privacy.epsilon 8 --privacy.cohort_size 5 --privacy.num_steps 5",
        "privacy.delta", "is missing", "give it",
    ),
    "a population that is missing": bad(
        "price", f"{PRICE} --privacy.population null", "privacy.population", "is missing",
        "give it",
    ),
    "examples that are missing under els": bad(
        "price", "--config WORLD/els.yaml --privacy.num_examples null", "privacy.num_examples",
        "is missing", "give it",
    ),
    "a comparison of els without a population": bad(
        "price", "--config WORLD/els.yaml --compare", "privacy.population", "--compare", "give it",
    ),
    "memory without a model": bad(
        "price", f"{PRICE} --memory", "model.name", "--memory", "give it",
    ),
    "memory without the length of examples": bad(
        "price", f"{PRICE} --memory --model.name WORLD/model", "data.block_tokens", "--memory",
        "give it",
    ),
    "memory of a model that is missing": bad(
        "price", f"{PRICE} --memory --model.name TMP/none --data.block_tokens 8", "model.name",
        "TMP/none", "correct the path",
    ),
    "a cohort above the population": bad(
        "price", f"{PRICE} --privacy.cohort_size 20000", "privacy.cohort_size", "20000", "lower it",
    ),
    "a batch above the examples": bad(
        "price", "--config WORLD/els.yaml --privacy.batch_size 200000", "privacy.batch_size",
        "200000", "lower it",
    ),
    "a batch size under uls": bad(
        "price", f"{PRICE} --privacy.batch_size 9", "privacy.batch_size", "is 9", "drop it",
    ),
    "a cap below the cohort": bad(
        "price", f"{PRICE} --privacy.max_cohort_size 10", "privacy.max_cohort_size", "is 10",
        "raise it",
    ),
    "bands without their mechanism": bad(
        "price", f"{PRICE} --privacy.bands 4", "privacy.bands", "is 4", "privacy.mechanism banded",
    ),
    "more bands than steps": bad(
        "price", f"{PRICE} --privacy.mechanism banded --privacy.bands 1000 --privacy.num_steps 9",
        "privacy.bands", "1000", "lower it",
    ),
    "more bands than cohorts": bad(
        "price",
        f"{PRICE} --privacy.mechanism banded --privacy.bands 9 --privacy.population 10000"
        " --privacy.cohort_size 5000 --privacy.num_steps 50",
        "privacy.bands", "45000 users", "lower one",
    ),
    "correlated noise of examples": bad(
        "price", "--config WORLD/els.yaml --privacy.mechanism banded", "privacy.mechanism", "els",
        "set privacy.sampling uls",
    ),
    "half a user": bad(
        "price", f"{PRICE} --privacy.cohort_size 1.5", "privacy.cohort_size", "'1.5'", "integer",
    ),
    "true for a number": bad(
        "price", "--config TMP/a.yaml", "privacy.num_steps", "true", "give a number",
        files={"a.yaml": "privacy: {num_steps: true, epsilon: 1, delta: 1e-6, cohort_size: 3}\n"},
    ),
    "an unknown sampler": bad(
        "price", f"{PRICE} --privacy.sampling both", "privacy.sampling", "'both'", "'uls' or 'els'",
    ),
    "a held-out share in braces": bad(
        "price", f"{PRICE} --data.heldout {{}}", "data.heldout", "{}", "must be",
    ),
    "an adjacency without a price": bad(
        "price", f"{PRICE} --privacy.adjacency replace_one", "privacy.adjacency", "replace_one",
        "use add_or_remove_one",
    ),
    "a target that promises nothing": bad(
        "price", f"{PRICE} --privacy.epsilon 1e300", "privacy.epsilon", "1e300",
        "less than or equal to 1000",
    ),
    "more steps than the accountant can tell apart": bad(
        "price", f"{PRICE} --privacy.num_steps 1000000000000", "privacy.num_steps",
        "1000000000000", "less than or equal to",
    ),
    "a delta below rounding": bad(
        "price", f"{PRICE} --privacy.delta 1e-320", "privacy.delta", "e-321", "raise it",
    ),
    "next to no noise": bad(
        "price", f"{PRICE} --privacy.epsilon null --privacy.noise_multiplier 1e-300",
        "privacy.noise_multiplier", "1e-300", "raise it",
    ),
    "noise too small to be priced": bad(
        "price", f"{PRICE} --privacy.epsilon null --privacy.noise_multiplier 1e-3",
        "privacy.noise_multiplier", "0.001", "raise",
    ),
    "a group of els that cannot be priced": bad(
        "price", "--config WORLD/els.yaml --privacy.group_size 100000000", "privacy.group_size",
        "100000000", "lower it",
    ),
    "memory of examples longer than the model's positions": bad(
        "price", f"{PRICE} --memory --model.name WORLD/model --data.block_tokens 1000",
        "data.block_tokens", "1000", "or less",
    ),
    "a store whose private counts are damaged": bad(
        "price", f"{PRICE} --privacy.population null --data.store WORLD/countless_store",
        "countless_store", "private.json is damaged", "prepare the store again",
    ),
    "no noise without consent": bad(
        "price", f"{PRICE} --privacy.epsilon null --privacy.noise_multiplier 0",
        "privacy.noise_multiplier", "is 0", "privacy.accept_no_guarantee",
    ),
    "a comparison without noise": bad(
        "price",
        f"{PRICE} --privacy.epsilon null --privacy.noise_multiplier 0"
        " --privacy.accept_no_guarantee true --compare",
        "privacy.noise_multiplier", "is 0", "raise it",
    ),
    "half of a dataset's total": bad(
        "price", f"{PRICE} --privacy.dataset_epsilon 8", "privacy.dataset_epsilon",
        "privacy.dataset_delta", "give both",
    ),
}  # fmt: skip

TRAININGS = {
    "a clip norm that is missing": bad(
        "train", f"{TRAIN} --privacy.clip_norm null", "privacy.clip_norm", "is null", "must be",
    ),
    "a negative clip norm": bad(
        "train", f"{TRAIN} --privacy.clip_norm -1", "privacy.clip_norm", "'-1'", "greater than 0",
        as_process=True,
    ),
    "an infinite clip norm": bad(
        "train", f"{TRAIN} --privacy.clip_norm inf", "privacy.clip_norm", "infinite",
        "give a finite one",
    ),
    "automatic clipping to an infinite norm": bad(
        "train",
        f"{TRAIN} --privacy.clipping automatic --privacy.noise_multiplier 0 --privacy.epsilon null"
        " --privacy.accept_no_guarantee true --privacy.clip_norm inf",
        "privacy.clip_norm", "infinite", "give a finite one",
    ),
    "a quantile without adaptive clipping": bad(
        "train", f"{TRAIN} --privacy.clip_quantile 0.9", "privacy.clip_quantile", "0.9", "drop it",
    ),
    "adaptive clipping whose count has too little noise": bad(
        "train", f"{TRAIN} --privacy.clipping adaptive --privacy.count_noise_stddev 0.01",
        "privacy.count_noise_stddev", "0.01", "raise it",
    ),
    "secure noise with a fused reduction": bad(
        "train",
        f"{TRAIN} --privacy.secure_noise true --train.fuse_reduce true --cluster.num_workers 2",
        "privacy.secure_noise is true, train.fuse_reduce", "cluster.num_workers 2",
        "set train.fuse_reduce false",
    ),
    "examples longer than the model's positions": bad(
        "train", f"{TRAIN} --data.block_tokens 128 --dry-run", "data.block_tokens", "128",
        "or less",
    ),
    "a store of examples longer than the model's positions": bad(
        "train", "--config WORLD/short_model.yaml --output TMP/out", "data.block_tokens", "32",
        "16 or less",
    ),
    "a store that is missing": bad(
        "train", f"{TRAIN} --data.store TMP/none", "TMP/none", "not a token store",
        "run jobs/prepare.py",
    ),
    "a file where the store should be": bad(
        "train", f"{TRAIN} --data.store WORLD/rows.parquet", "rows.parquet", "not a token store",
        "run jobs/prepare.py",
    ),
    "a store of another tokenizer": bad(
        "train", f"{TRAIN} --data.tokenizer WORLD/other_tokenizer", "data.tokenizer",
        "other_tokenizer", "name that one",
    ),
    "a store that is not packed as it should be": bad(
        "train", f"{TRAIN} --data.pack true", "data.pack", "prepared with false", "leave data.pack",
    ),
    "a store without the order that it should have": bad(
        "train", f"{TRAIN} --data.order_column time", "data.order_column", "prepared with none",
        "leave data.order_column",
    ),
    "a store of another name": bad(
        "train", f"{TRAIN} --data.name others", "data.name", "others", "correct one",
    ),
    "a store whose manifest is broken": bad(
        "train", f"{TRAIN} --data.store WORLD/broken_store", "manifest.json", "version",
        "prepare the store again",
    ),
    "a store with a damaged shard": bad(
        "train", f"{TRAIN} --data.store WORLD/damaged_store", "shard-00000.bin", "damaged",
        "prepare the store again",
    ),
    "a store at a URL with a password": bad(
        "train", f"{TRAIN} --data.store s3://key:{SECRET}@bucket/chats", "data.store", "password",
        "leave it out",
    ),
    "checkpoints at a URL with a token": bad(
        "train", f"{TRAIN} --cluster.storage s3://bucket/x?session_token={SECRET}",
        "cluster.storage", "password", "leave it out",
    ),
    "a ledger that is missing": bad(
        "train", f"{TRAIN} --data.ledger sqlite:///TMP/none.sqlite", "ledger", "none.sqlite",
        "data.ledger",
    ),
    "a ledger of another kind": bad(
        "train", f"{TRAIN} --data.ledger mysql://user:{SECRET}@host/x", "data.ledger", "mysql",
        "use sqlite or postgresql",
    ),
    "another ledger than the store's": bad(
        "train", f"{TRAIN} --data.ledger sqlite:///WORLD/other.sqlite", "other.sqlite",
        "the store was prepared with", "data.ledger",
    ),
    "a model that is missing": bad(
        "train", f"{TRAIN} --model.name TMP/none --data.tokenizer WORLD/model", "model.name",
        "TMP/none", "correct the path",
    ),
    "a folder that holds no model": bad(
        "train", f"{TRAIN} --model.name WORLD/full --data.tokenizer WORLD/model", "model.name",
        "WORLD/full", "give a complete one",
    ),
    "a model without a name": bad(
        "train", "--config TMP/a.yaml", "model.name", "''", "give a value",
        files={"a.yaml": "model: {name: ''}\n"},
    ),
    "an output that is not empty": bad(
        "train", "--config WORLD/train.yaml --output WORLD/full", "output", "WORLD/full",
        "give another folder",
    ),
    "an output that is a file": bad(
        "train", "--config WORLD/train.yaml --output WORLD/rows.parquet", "output", "rows.parquet",
        "give a folder",
    ),
    "an output below a file": bad(
        "train", "--config WORLD/train.yaml --output WORLD/rows.parquet/out", "output",
        "rows.parquet", "give a folder",
    ),
    "an output where nothing may be written": bad(
        "train", "--config WORLD/train.yaml --output WORLD/locked/out", "output", "locked",
        "give a folder", needs_permissions=True,
    ),
    "checkpoints in a file": bad(
        "train", f"{TRAIN} --cluster.storage WORLD/rows.parquet", "cluster.storage",
        "rows.parquet", "give a folder",
    ),
    "an output that is a URL": bad(
        "train", "--config WORLD/train.yaml --output s3://bucket/out", "output", "s3://bucket/out",
        "give a folder",
    ),
    "an output without a name": bad(
        "train", "--config TMP/a.yaml", "output", "''", "give a value",
        files={"a.yaml": "output: ''"},
    ),
    "an output with a NUL character": bad(
        "train", "--config TMP/a.yaml", "output", "NUL", "remove it",
        files={"a.yaml": 'output: "a\\0b"'},
    ),
    "a resume of nothing": bad(
        "train", f"{TRAIN} --resume", "TMP/out", "no run to resume", "leave --resume out",
    ),
    "a resume of a run whose record is damaged": bad(
        "train", "--config WORLD/train.yaml --output WORLD/damaged_run --resume", "run.json",
        "damaged", "restore it",
    ),
    "a resume of a run that the ledger does not know": bad(
        "train", "--config WORLD/train.yaml --output WORLD/strange_run --resume", "no-such-run",
        "never admitted", "correct the run",
    ),
    "a resume of a run that has ended": bad(
        "train", "--config WORLD/train.yaml --output WORLD/ended_run --resume", "output",
        "has ended", "give another folder",
    ),
    "a delta of one over the store's users": bad(
        "train", f"{TRAIN} --privacy.population null --privacy.delta 0.5", "privacy.delta", "0.5",
        "lower it",
    ),
    "evaluations of half": bad(
        "train", f"{TRAIN} --train.evaluate_examples half", "train.evaluate_examples", "'half'",
        "give a number of examples, auto or all",
    ),
    "an evaluation between checkpoints": bad(
        "train", f"{TRAIN} --train.evaluate_every 3", "train.evaluate_every", "is 3",
        "a multiple of",
    ),
    "an average to publish without one": bad(
        "train", f"{TRAIN} --train.publish average", "train.publish", "average",
        "set train.average ema or tail",
    ),
    "an average to publish in a sweep without one": bad(
        "sweep", f"{SWEEP} --train.publish average", "train.publish", "average",
        "set train.average ema or tail",
    ),
    "offloading without stage 3": bad(
        "train", f"{TRAIN} --train.offload optimizer", "train.offload", "train.zero_stage is 0",
        "set train.zero_stage 3",
    ),
    "the direct kernel under stage 3": bad(
        "train", f"{TRAIN} --train.zero_stage 3 --train.kernel direct", "train.zero_stage is 3",
        "direct", "set train.kernel auto",
    ),
    "dropout with the ghost kernel": bad(
        "train", f"{TRAIN} --train.kernel ghost --model.dropout 0.1", "model.dropout", "0.1",
        "set model.dropout=0",
    ),
    "a group above the microbatch under stage 3": bad(
        "train", f"{TRAIN} --train.zero_stage 3 --train.microbatch_tokens 40",
        "train.microbatch_tokens", "40", "raise the last to",
    ),
    "decay rates of Adam above one": bad(
        "train", f"{TRAIN} --train.betas [0.9,1.5]", "train.betas", "1.5", "less than 1",
    ),
    "a learning rate of zero": bad(
        "train", f"{TRAIN} --train.learning_rate 0", "train.learning_rate", "'0'",
        "greater than 0",
    ),
    "a weight decay that is not a number": bad(
        "train", f"{TRAIN} --train.weight_decay nan", "train.weight_decay", "'nan'", "finite",
    ),
    "adapters of rank zero": bad(
        "train", f"{TRAIN} --model.lora.rank 0", "model.lora.rank", "'0'", "greater than 0",
    ),
    "adapters on everything and something": bad(
        "train", "--config TMP/a.yaml", "model.lora.target_modules", "q_proj", "alone",
        files={
            "a.yaml": "model: {name: m, lora: {rank: 2, target_modules: [all-linear, q_proj]}}\n"
        },
    ),
    "no workers": bad(
        "train", f"{TRAIN} --cluster.num_workers 0", "cluster.num_workers", "'0'",
        "whole number of at least 1",
    ),
    "a range of workers that begins with the most": bad(
        "train", f"{TRAIN} --cluster.num_workers [8,2]", "cluster.num_workers", "'[8,2]'",
        "LEAST first",
    ),
    "a range of workers in a sweep": bad(
        "sweep", f"{SWEEP} --cluster.num_workers [1,2]", "cluster.num_workers", "[1, 2]",
        "give one number",
    ),
    "a Ray client's address": bad(
        "train", f"{TRAIN} --cluster.address ray://head:10001", "cluster.address",
        "ray://head:10001", "ray job submit",
    ),
    "an address without a cluster": bad(
        "train", f"{TRAIN} --cluster.address 127.0.0.1:1 --dry-run --data.store TMP/none"
        " --privacy.population null", "TMP/none", "not a token store", "jobs/prepare.py",
    ),
}  # fmt: skip

SWEEPS = {
    "a sweep without a release": bad(
        "sweep", "--config WORLD/train.yaml --output TMP/out", "section 'sweep'", "is missing",
        "give it",
        as_process=True,
    ),
    "an unknown release": bad(
        "sweep", f"{SWEEP} --sweep.release winner", "sweep.release", "'winner'", "'best'",
    ),
    "a range that is none": bad(
        "sweep", "--config TMP/a.yaml", "sweep.clip_norm", "from 10 to 1", "LOW < HIGH",
        files={"a.yaml": "sweep: {release: all, clip_norm: from 10 to 1 in 3}\n"},
    ),
    "a clip norm tried twice": bad(
        "sweep", "--config TMP/a.yaml", "sweep.clip_norm", "[1.0, 1.0]", "name it once",
        files={"a.yaml": "sweep: {release: all, clip_norm: [1, 1]}\n"},
    ),
    "nothing to try": bad(
        "sweep", "--config TMP/a.yaml", "sweep.clip_norm", "[]", "leave the list out",
        files={"a.yaml": "sweep: {release: all, clip_norm: []}\n"},
    ),
    "a resumed sweep that is a training run": bad(
        "sweep", "--config WORLD/sweep.yaml --output WORLD/ended_run --resume", "output",
        "a training run", "use jobs/train.py",
    ),
    "checkpoints of a sweep in a file": bad(
        "sweep", f"{SWEEP} --cluster.storage WORLD/rows.parquet", "cluster.storage",
        "rows.parquet", "give a folder",
    ),
    "a scheduler": bad(
        "sweep", f"{SWEEP} --sweep.scheduler asha", "sweep.scheduler", "asha", "leave it out",
    ),
    "no expected trials": bad(
        "sweep", f"{SWEEP} --sweep.expected_trials 0", "sweep.expected_trials", "'0'",
        "greater than or equal to 1",
    ),
    "a cap in a sweep": bad(
        "sweep", f"{SWEEP} --privacy.max_cohort_size 20", "privacy.max_cohort_size", "sweep",
        "drop it",
    ),
    "a secret sweep that would be re-keyed": bad(
        "sweep", f"{SWEEP} --sweep.release best --privacy.on_mismatch rekey",
        "privacy.on_mismatch", "rekey", "set it to refuse",
    ),
    "a public sweep of data with a total": bad(
        "sweep",
        f"{SWEEP} --sweep.release public --privacy.dataset_epsilon 8 --privacy.dataset_delta 1e-3",
        "privacy.dataset_epsilon", "public", "use all or best",
    ),
    "secure noise with a fused reduction, in a sweep": bad(
        "sweep",
        f"{SWEEP} --privacy.secure_noise true --train.fuse_reduce true --cluster.num_workers 2",
        "privacy.secure_noise is true, train.fuse_reduce", "cluster.num_workers 2",
        "set train.fuse_reduce false",
    ),
    "a large group under stage 3, in a sweep": bad(
        "sweep", "--config WORLD/sweep_of_groups.yaml --output TMP/out --train.zero_stage 3",
        "train.microbatch_tokens", "group of 4 examples", "raise the last to",
    ),
    "dropout with the ghost kernel, in a sweep": bad(
        "sweep", f"{SWEEP} --train.kernel ghost --model.dropout 0.1", "model.dropout", "0.1",
        "set model.dropout=0",
    ),
    "a sweep without held-out users": bad(
        "sweep", f"{SWEEP} --data.store WORLD/no_heldout_store", "data.store", "held-out",
        "set data.heldout",
    ),
    "a sweep that leaves nothing to try": bad(
        "sweep", f"{SWEEP} --sweep.group_size 5 --dry-run", "sweep", "G = 5", "whole number",
    ),
    "a resumed sweep of nothing": bad(
        "sweep", f"{SWEEP} --resume", "TMP/out", "no run to resume", "leave --resume out",
    ),
    "an output of a sweep that is a file": bad(
        "sweep", "--config WORLD/sweep.yaml --output WORLD/rows.parquet", "output", "rows.parquet",
        "give a folder",
    ),
}  # fmt: skip

PREPARATIONS = {
    "an input that is missing": bad(
        "prepare", f"{PREPARE} --data.input TMP/none.parquet", "data.input", "none.parquet",
        "correct the path",
    ),
    "no input": bad(
        "prepare", "--data.name x --data.store TMP/s --data.tokenizer WORLD/model", "data.input",
        "is missing", "name the files",
    ),
    "a pattern that matches nothing": bad(
        "prepare", f"{PREPARE} --data.input TMP/*.parquet", "data.input", "*.parquet",
        "correct the path",
    ),
    "an input of no known format": bad(
        "prepare", f"{PREPARE} --data.input WORLD/price.yaml", "data.input", "price.yaml",
        "give files that end in",
    ),
    "a parquet file that is none": bad(
        "prepare", f"{PREPARE} --data.input WORLD/garbage.parquet", "garbage.parquet", "parquet",
        "leave it out",
    ),
    "an input without rows": bad(
        "prepare", f"{PREPARE} --data.input WORLD/empty.parquet", "data.input", "empty.parquet",
        "give",
    ),
    "an empty CSV file": bad(
        "prepare", f"{PREPARE} --data.input WORLD/empty.csv", "empty.csv", "cannot be read",
        "leave it out",
    ),
    "an empty name of an input": bad(
        "prepare", "--config TMP/a.yaml", "data.input", "''", "give a value",
        files={"a.yaml": "data: {name: x, store: TMP/s, input: ['']}\n"},
    ),
    "a user column that is not there": bad(
        "prepare", f"{PREPARE} --data.user_column author", "data.user_column", "'author'", "it has",
    ),
    "a text column that is not there": bad(
        "prepare", f"{PREPARE} --data.text_column body", "data.text_column", "'body'", "it has",
    ),
    "an order column that is missing": bad(
        "prepare", f"{PREPARE} --data.order_column time", "data.order_column", "'time'", "it has",
    ),
    "an order of texts that are not joined": bad(
        "prepare", f"{PREPARE} --data.order_column text --data.pack false", "data.order_column",
        "'text'", "set data.pack true",
    ),
    "packing that is neither on nor off": bad(
        "prepare", f"{PREPARE} --data.pack perhaps", "data.pack", "'perhaps'", "boolean",
    ),
    "a prompt without a response": bad(
        "prepare", f"{PREPARE} --data.prompt_column text", "data.prompt_column",
        "data.response_column", "give both",
    ),
    "a held-out share above one": bad(
        "prepare", f"{PREPARE} --data.heldout 1.5", "data.heldout", "1.5", "between 0 and 1",
    ),
    "a held-out file that is missing": bad(
        "prepare", f"{PREPARE} --data.heldout TMP/none.parquet", "data.heldout", "none.parquet",
        "correct the path",
    ),
    "a name with a slash": bad(
        "prepare", f"{PREPARE} --data.name a/b", "data.name", "'a/b'", "use letters",
        as_process=True,
    ),
    "a tokenizer that is missing": bad(
        "prepare", f"{PREPARE} --data.tokenizer TMP/none", "data.tokenizer", "TMP/none",
        "correct the path",
    ),
    "a folder that holds no tokenizer": bad(
        "prepare", f"{PREPARE} --data.tokenizer WORLD/full", "data.tokenizer", "WORLD/full",
        "give a complete one",
    ),
    "no tokenizer": bad(
        "prepare", "--data.name x --data.store TMP/s --data.input WORLD/rows.parquet",
        "data.tokenizer", "is missing", "model.name",
    ),
    "a tokenizer that cannot end a text": bad(
        "prepare", f"{PREPARE} --data.tokenizer WORLD/endless_tokenizer", "data.tokenizer",
        "endless_tokenizer", "set one",
    ),
    "a store that is not empty": bad(
        "prepare", "--config WORLD/prepare.yaml --data.store WORLD/full", "data.store",
        "WORLD/full", "choose another folder",
    ),
    "a store below a file": bad(
        "prepare", "--config WORLD/prepare.yaml --data.store WORLD/rows.parquet/store",
        "data.store", "rows.parquet", "folder",
    ),
    "a store at a URL without a ledger": bad(
        "prepare", "--config WORLD/prepare.yaml --data.store s3://bucket/x --dry-run",
        "data.ledger", "s3://bucket/x", "give postgresql",
    ),
    "examples of one token": bad(
        "prepare", f"{PREPARE} --data.block_tokens 1", "data.block_tokens", "'1'",
        "greater than or equal to 2",
    ),
    "blocks longer than the model's positions": bad(
        "prepare", f"{PREPARE} --data.block_tokens 128 --model.name WORLD/model",
        "data.block_tokens", "128", "or less",
    ),
    "no shards": bad(
        "prepare", f"{PREPARE} --data.num_shards 0", "data.num_shards", "'0'", "greater than 0",
    ),
    "a ledger that is no database": bad(
        "prepare", f"{STORING} --data.ledger WORLD/ledger.sqlite", "data.ledger", "database URL",
        "write sqlite:////",
    ),
    "a ledger below a file": bad(
        "prepare", f"{STORING} --data.ledger sqlite:///WORLD/rows.parquet/l.sqlite", "data.ledger",
        "rows.parquet", "give a place",
    ),
    "blocks longer than any model's": bad(
        "prepare", f"{PREPARE} --data.block_tokens 99999999999999999999", "data.block_tokens",
        "99999999999999999999", "less than or equal to",
    ),
    "a ledger that is a damaged file": bad(
        "prepare", f"{STORING} --data.ledger sqlite:///WORLD/garbage.sqlite", "garbage.sqlite",
        "not a database", "restore",
    ),
    "a Ray client's address, while preparing": bad(
        "prepare", f"{PREPARE} --cluster.address ray://head:10001", "cluster.address",
        "ray://head:10001", "ray job submit",
    ),
}  # fmt: skip

LEDGERS = {
    "an unknown command": bad(
        "ledger", f"reset {LEDGER}", "reset", "invalid choice", "show", as_process=True,
    ),
    "no command": bad("ledger", "", "command", "required", "--help"),
    "a ledger that does not exist": bad(
        "ledger", "show --ledger sqlite:///TMP/none.sqlite --dataset x", "none.sqlite",
        "no ledger", "restore",
    ),
    "a ledger that is a text file": bad(
        "ledger", "show --ledger sqlite:///WORLD/garbage.sqlite --dataset x", "garbage.sqlite",
        "not a database", "restore",
    ),
    "a dataset that the ledger does not know": bad(
        "ledger", "show --ledger sqlite:///WORLD/ledger.sqlite --dataset strangers", "'strangers'",
        "no dataset", "prepare its data first",
    ),
    "a ledger without a dataset": bad(
        "ledger", "show --ledger sqlite:///WORLD/ledger.sqlite", "dataset", "is missing",
        "give --dataset",
    ),
    "a ledger that others may read": bad(
        "ledger", "show --ledger sqlite:///WORLD/readable.sqlite --dataset x", "readable.sqlite",
        "mode 644", "run chmod 600",
    ),
    "a server that does not answer, and a password": bad(
        "ledger", f"show --ledger postgresql://user:{SECRET}@127.0.0.1:1/x --dataset x",
        "postgresql://user@127.0.0.1:1/x", "does not answer", "then retry",
    ),
    "a ledger whose URL has a typo": bad(
        "ledger", "show --ledger sqllite:///x --dataset x", "ledger", "sqllite", "use sqlite",
    ),
    "a total of zero": bad(
        "ledger", f"set-budget {LEDGER} --epsilon 0 --delta 1e-6", "epsilon", "0.0",
        "give a positive and finite epsilon",
    ),
    "a negative total": bad(
        "ledger", f"set-budget {LEDGER} --epsilon -3 --delta 1e-6", "epsilon", "-3.0",
        "give a positive and finite epsilon",
    ),
    "an infinite total": bad(
        "ledger", f"set-budget {LEDGER} --epsilon inf --delta 1e-6", "epsilon", "inf", "finite",
    ),
    "a total delta of one": bad(
        "ledger", f"set-budget {LEDGER} --epsilon 3 --delta 1", "delta", "1.0",
        "a delta in (0, 1)",
    ),
    "a total without a delta": bad(
        "ledger", f"set-budget {LEDGER} --epsilon 3", "delta", "is missing", "give --delta",
    ),
    "a total below what was spent": bad(
        "ledger", f"set-budget {LEDGER} --epsilon 0.01 --delta 1e-6", "0.01", "was spent",
        "at least",
    ),
    "a run that is not there": bad(
        "ledger", f"abandon {LEDGER} --run missing", "run", "'missing'", "correct the run",
    ),
    "a run of other data": bad(
        "ledger", "abandon --ledger sqlite:///WORLD/ledger.sqlite --dataset other-users --run run",
        "run", "other-users", "of them",
    ),
    "a run that has reserved steps": bad(
        "ledger", f"abandon {LEDGER} --run run", "run", "'run'", "stays charged",
    ),
    "no run to abandon": bad("ledger", f"abandon {LEDGER}", "run", "is missing", "give --run"),
}  # fmt: skip

VERIFICATIONS = {
    "a folder that is not there": bad(
        "verify", "--output TMP/none", "TMP/none", "cannot be read", "give the output folder",
        as_process=True,
    ),
    "a folder that is not a run": bad(
        "verify", "--output WORLD/model", "privacy.json", "WORLD/model", "give the output folder",
    ),
    "no folder": bad("verify", "", "output", "is missing", "give it"),
    "a statement that is broken JSON": bad(
        "verify", "--output TMP/privacy.json", "privacy.json", "not valid JSON", "restore",
        files={"privacy.json": '{"plan": '},
    ),
    "a statement that is a list": bad(
        "verify", "--output TMP/privacy.json", "privacy.json", "not a privacy statement",
        "give the output folder", files={"privacy.json": "[1, 2]"},
    ),
    "a statement that is not text": bad(
        "verify", "--output TMP/privacy.json", "privacy.json", "not valid JSON", "restore",
        files={"privacy.json": b"\xff\xfe\x00"},
    ),
    "a statement whose plan was edited": bad(
        "verify", "--output WORLD/edited_plan.json", "edited_plan.json", "noise_stddev",
        "changed by hand",
    ),
    "a statement with a string for a number": bad(
        "verify", "--output WORLD/edited_type.json", "edited_type.json", "noise_multiplier",
        "give the output folder",
    ),
    "a statement without its run": bad(
        "verify", "--output WORLD/promise.json", "promise.json", "is a promise",
        "give the output folder",
    ),
    "a statement of a later version": bad(
        "verify", "--output WORLD/later.json", "later.json", "99", "give the output folder",
    ),
    "a statement of a sweep that was edited": bad(
        "verify", "--output TMP/privacy.json", "privacy.json", "edited or damaged",
        "restore", files={"privacy.json": '{"sweep_schema_version": 1}'},
    ),
    "a ledger that is elsewhere": bad(
        "verify", "--output WORLD/run --ledger sqlite:///TMP/none.sqlite", "none.sqlite",
        "no ledger", "restore",
    ),
    "a ledger that does not know the run": bad(
        "verify", "--output WORLD/run --ledger sqlite:///WORLD/other.sqlite", "'run'",
        "never admitted", "correct the run or the ledger",
    ),
    "a statement that is a number": bad(
        "verify", "--output TMP/privacy.json", "privacy.json", "not a privacy statement",
        "give the output folder", files={"privacy.json": "7"},
    ),
    "a run at a URL": bad(
        "verify", "--output s3://bucket/run", "output", "s3://bucket/run", "give a folder",
    ),
}  # fmt: skip

DRAINS = {
    "no cluster to leave": bad(
        "drain", "--cluster.address 127.0.0.1:1", "cluster.address", "127.0.0.1:1", "start one",
        as_process=True,
    ),
    "a client's address": bad(
        "drain", "--cluster.address ray://head:10001", "cluster.address", "ray://head:10001",
        "ray job submit",
    ),
    "a node that is an empty text": bad("drain", "--node_id=", "node_id", "''", "give a value"),
    "no time to leave": bad("drain", "--within_s 0", "within_s", "'0'", "greater than 0"),
    "a time that is a word": bad("drain", "--within_s soon", "within_s", "'soon'", "number"),
}  # fmt: skip

PLANS = {
    "no workload": bad(
        "plan", "--config WORLD/train.yaml", "plan", "is missing", "give it", as_process=True,
    ),
    "two histograms": bad(
        "plan", f"{PLAN} --plan.store WORLD/store", "plan.examples_per_user", "plan.store",
        "exactly one",
    ),
    "a store's own histogram without consent": bad(
        "plan", "--config WORLD/plan_of_store.yaml", "plan.store", "private",
        "plan.use_private_histogram",
    ),
    "a store for the plan that is missing": bad(
        "plan", "--config WORLD/plan_of_store.yaml --plan.store TMP/none"
        " --plan.use_private_histogram true", "TMP/none", "not a token store", "jobs/prepare.py",
    ),
    "a cosine above one": bad(
        "plan", f"{PLAN} --plan.gradient_cosine 2", "plan.gradient_cosine", "'2'",
        "less than or equal to 1",
    ),
    "a cosine that is missing": bad(
        "plan", f"{PLAN} --plan.gradient_cosine null", "plan.gradient_cosine", "is missing",
        "give it",
    ),
    "a plan's delta of 1/N": bad(
        "plan", f"{PLAN} --plan.delta 0.1", "plan.delta", "0.1", "lower it",
    ),
    "a histogram without users": bad(
        "plan", "--config TMP/a.yaml", "plan.examples_per_user", "0", "greater than 0",
        files={
            "a.yaml": "plan: {population: 100, examples_per_user: {3: 0}, batch_size: 8,"
            " num_steps: 3, epsilon: 1, delta: 1e-6, gradient_cosine: 0.1}\n"
        },
    ),
    "a histogram without entries": bad(
        "plan", "--config TMP/a.yaml", "plan.examples_per_user", "{}", "give",
        files={
            "a.yaml": "plan: {population: 100, examples_per_user: {}, batch_size: 8,"
            " num_steps: 3, epsilon: 1, delta: 1e-6, gradient_cosine: 0.1}\n"
        },
    ),
    "group sizes that do not fit": bad(
        "plan", f"{PLAN} --plan.batch_size 1000000000", "plan.batch_size", "1000000000", "lower it",
    ),
    "public text that is missing": bad(
        "plan", f"{PLAN} --estimate-on TMP/none.parquet --estimate.model WORLD/model",
        "--estimate-on", "TMP/none.parquet", "give one",
    ),
    "a histogram that is not JSON": bad(
        "plan", f"{PLAN} --plan.examples_per_user {{a:1}}", "plan.examples_per_user",
        "Expecting property name", "write it in the --config file",
    ),
    "an estimate with a model that is missing": bad(
        "plan", f"{PLAN} --estimate-on WORLD/public.parquet --estimate.model TMP/none",
        "estimate.model", "TMP/none", "correct the path",
    ),
    "an estimate on too little text": bad(
        "plan",
        f"{PLAN} --estimate-on WORLD/empty.parquet --estimate.model WORLD/model"
        " --estimate.user_column who",
        "--estimate-on", "empty.parquet", "give more text",
    ),
    "an estimate without a model": bad(
        "plan", f"{PLAN} --estimate-on WORLD/public.parquet", "estimate.model", "is missing",
        "give the model",
    ),
    "public text without the user column": bad(
        "plan",
        f"{PLAN} --estimate-on WORLD/public.parquet --estimate.model WORLD/model"
        " --estimate.user_column author",
        "estimate.user_column", "author", "it has",
    ),
    "an output of a plan that is a file": bad(
        "plan", f"{PLAN} --output WORLD/rows.parquet", "output", "rows.parquet", "give a folder",
    ),
    "an output of a plan that is a URL": bad(
        "plan", f"{PLAN} --output s3://bucket/plan", "output", "s3://bucket/plan", "give a folder",
    ),
}  # fmt: skip

STUDIES = {
    "a study without users": bad(
        "mean_estimation", f"{MEAN} --study.num_users 0", "study.num_users", "'0'",
        "greater than 0", as_process=True,
    ),
    "no study": bad(
        "mean_estimation", "--config WORLD/train.yaml --output TMP/out", "study", "is missing",
        "give it",
    ),
    "a group above what users have": bad(
        "mean_estimation", f"{MEAN} --study.examples_per_user 1", "group size",
        "examples_per_user = 1", "remove it",
    ),
    "a study's delta of 1/N": bad(
        "mean_estimation", f"{MEAN} --study.delta 0.5", "study.delta", "0.5", "lower it",
    ),
    "one scoring seed": bad(
        "mean_estimation", f"{MEAN} --study.scoring_seeds 1", "study.scoring_seeds", "'1'",
        "greater than or equal to 2",
    ),
    "a study's budget that fits no method": bad(
        "mean_estimation", f"{MEAN} --study.budgets 1000000000", "study.budgets", "1000000000",
        "lower it",
    ),
    "a study's output that is not empty": bad(
        "mean_estimation", "--config WORLD/mean_estimation.yaml --output WORLD/full", "output",
        "WORLD/full", "give another folder",
    ),
    "a study's output that is a URL": bad(
        "mean_estimation", "--config WORLD/mean_estimation.yaml --output s3://bucket/x", "output",
        "s3://bucket/x", "give a folder",
    ),
    "results to draw again that are missing": bad(
        "mean_estimation", f"{MEAN} --redraw", "TMP/out", "no results", "run it first",
    ),
    "results of something else to draw again": bad(
        "mean_estimation", "--config WORLD/mean_estimation.yaml --output WORLD/strange_results"
        " --redraw", "strange_results", "other columns", "run it first",
    ),
    "a study of an unknown variant": bad(
        "study", f"{STUDY} --only steep", "only", "'steep'", "known are flat", as_process=True,
    ),
    "a study without its baseline": bad(
        "study", "--config WORLD/study_without_baseline.yaml --output TMP/out",
        "baseline of block all", "is steep", "choose one of flat",
    ),
    "a study of data in no folder": bad(
        "study", "--config WORLD/study_elsewhere.yaml --output TMP/out", "study.datasets",
        "without data_folder", "give data_folder",
    ),
    "a study whose base is missing": bad(
        "study", f"{STUDY} --study.base TMP/none.yaml", "settings file", "none.yaml",
        "give a readable",
    ),
    "a study whose baseline is refused": bad(
        "study", f"{STUDY} --study.overrides privacy.clip_norm=-1", "privacy.clip_norm", "-1",
        "greater than 0",
    ),
    "a study that sets a seed": bad(
        "study", f"{STUDY} --study.overrides privacy.seed=3", "override", "privacy.seed=3",
        "leave it out",
    ),
    "a study's override without a value": bad(
        "study", f"{STUDY} --study.overrides privacy.epsilon", "study.overrides",
        "privacy.epsilon", "write it as",
    ),
    "a study without seeds": bad(
        "study", f"{STUDY} --study.seeds one", "study.seeds", "one", "integer",
    ),
    "a study in a folder of others": bad(
        "study", "--config WORLD/study.yaml --output WORLD/full", "output", "WORLD/full",
        "give another folder",
    ),
    "a study at a URL": bad(
        "study", "--config WORLD/study.yaml --output s3://bucket/x", "output", "s3://bucket/x",
        "give a folder",
    ),
    "a report of no study": bad(
        "study", f"{STUDY} --report", "output", "no results", "run the study first",
    ),
    "a benchmark without rounds": bad(
        "benchmark", f"{BENCHMARK} --study.rounds 0", "study.rounds", "'0'", "greater than 0",
        as_process=True,
    ),
    "a benchmark without a study": bad(
        "benchmark", "--config WORLD/train.yaml --output TMP/out", "study", "is missing", "give it",
    ),
    "an unknown contestant": bad(
        "benchmark", f"{BENCHMARK} --study.contestants faster", "study.contestants", "'faster'",
        "'ghost'",
    ),
    "a cell of an unknown model": bad(
        "benchmark", "--config WORLD/benchmark_of_strangers.yaml --output TMP/out", "model",
        "stranger", "add it",
    ),
    "a benchmark's output that is not empty": bad(
        "benchmark", "--config WORLD/benchmark.yaml --output WORLD/full", "output", "WORLD/full",
        "give another folder",
    ),
    "a benchmark's output that is a URL": bad(
        "benchmark", "--config WORLD/benchmark.yaml --output s3://bucket/x", "output",
        "s3://bucket/x", "give a folder",
    ),
}  # fmt: skip

GENERATIONS = {
    "a model to generate with that is missing": bad(
        "generate", "--run TMP/none", "run is", "TMP/none", "correct the path",
    ),
    "a folder without a model": bad(
        "generate", "--run WORLD/run", "run is", "WORLD/run", "give the output folder",
    ),
    "a run that has not ended": bad(
        "generate", "--run WORLD/ended_run", "run is", "WORLD/ended_run", "--resume",
    ),
    "no model to generate with": bad(
        "generate", "--num_samples 1", "run", "is missing", "give it", as_process=True,
    ),
    "a top_p of zero": bad(
        "generate", "--run WORLD/model --top_p 0", "top_p", "'0'", "greater than 0",
    ),
    "a top_p above one": bad(
        "generate", "--run WORLD/model --top_p 1.5", "top_p", "'1.5'", "less than or equal to 1",
    ),
    "a negative temperature": bad(
        "generate", "--run WORLD/model --temperature -1", "temperature", "'-1'", "greater than",
    ),
    "no texts to generate": bad(
        "generate", "--run WORLD/model --num_samples 0", "num_samples", "'0'", "greater than 0",
    ),
    "an empty prompt": bad(
        "generate", "--run WORLD/model --prompt=", "prompt", "empty text", "give a value",
    ),
    "a prompt and a file of prompts": bad(
        "generate", "--run WORLD/model --prompt w1 --prompts WORLD/rows.parquet", "prompts",
        "rows.parquet", "give one of the two",
    ),
    "prompts that are missing": bad(
        "generate", "--run WORLD/model --prompts TMP/none.jsonl", "prompts", "none.jsonl",
        "give another file",
    ),
    "prompts of an unknown format": bad(
        "generate", "--run WORLD/model --prompts WORLD/empty.csv", "prompts", "empty.csv",
        "ends in",
    ),
    "prompts without the column": bad(
        "generate", "--run WORLD/model --prompts WORLD/rows.parquet", "prompt_column", "'prompt'",
        "name one of 'who', 'text'",
    ),
    "prompts that are numbers": bad(
        "generate", "--run WORLD/model --prompts WORLD/numbers.parquet --prompt_column text",
        "prompt_column", "int64", "name a column of text",
    ),
    "prompts that are no parquet": bad(
        "generate", "--run WORLD/model --prompts WORLD/garbage.parquet", "prompts",
        "garbage.parquet", "give another file",
    ),
    "more tokens than positions": bad(
        "generate", "--run WORLD/short_model --max_new_tokens 16", "max_new_tokens is 16",
        "16 positions", "lower max_new_tokens",
    ),
    "a prompt longer than the positions": bad(
        "generate", "--run WORLD/model --max_new_tokens 8 --prompts TMP/p.txt", "max_new_tokens",
        "prompt 2 has 40 tokens", "shorten the prompt", files={"p.txt": "w1\n" + "w2 " * 40},
    ),
    "held-out text without an output": bad(
        "generate", "--run WORLD/model --heldout WORLD/rows.parquet", "heldout", "rows.parquet",
        "give output",
    ),
    "a base model that is missing": bad(
        "generate", "--run WORLD/model --base TMP/none --max_new_tokens 8", "base is", "TMP/none",
        "correct the path",
    ),
    "generated text for a folder that is not empty": bad(
        "generate", "--run WORLD/model --output WORLD/full", "output", "WORLD/full",
        "give another folder",
    ),
    "generated text for the model's own folder": bad(
        "generate", "--run WORLD/model --output WORLD/model", "output", "WORLD/model",
        "give another folder",
    ),
    "generated text for a URL": bad(
        "generate", "--run WORLD/model --output s3://bucket/x", "output", "s3://bucket/x",
        "give a folder",
    ),
    "generated text in an unknown format": bad(
        "generate", "--run WORLD/model --format csv", "format", "'csv'", "'jsonl'",
    ),
}  # fmt: skip

OTHERS = {
    "a demo outside its folder": bad(
        "demo", f"{DEMO} --data.store TMP/elsewhere/store", "data.store", "elsewhere", "put it",
    ),
    "a demo with a ledger of its own": bad(
        "demo", f"{DEMO} --data.store TMP/demo/store --data.ledger sqlite:///TMP/demo/l.sqlite",
        "data.ledger", "is set", "leave it out",
    ),
    "a demo in a folder of others": bad(
        "demo", "--config WORLD/train.yaml --output WORLD/full/private --data.store"
        " WORLD/full/store", "WORLD/full", "not made by the demo", "give another output",
    ),
    "a demo of an unknown field": bad(
        "demo", f"{DEMO} --privacy.sigma 1", "--privacy.sigma", "unrecognized", "--help",
        as_process=True,
    ),
    "a demo of a missing input": bad(
        "demo", f"{DEMO} --data.store TMP/demo/store --data.input TMP/none.parquet", "data.input",
        "none.parquet", "correct the path",
    ),
    "an audit of a run that is missing": bad(
        "audit", "--of TMP/none --output TMP/out", "--of", "TMP/none", "give the output folder",
    ),
    "a black box audit in a folder of others": bad(
        "audit", "--config WORLD/train.yaml --audit.box black --output WORLD/full", "output",
        "WORLD/full", "give another folder",
    ),
    "fewer synthetic texts than users": bad(
        "synthesize", "--num_users 10 --num_texts 9 --output TMP/out", "num_texts", "is 9",
        "raise num_texts", as_process=True,
    ),
    "more files than synthetic texts": bad(
        "synthesize", "--num_users 2 --num_texts 3 --num_files 4 --output TMP/out", "num_files",
        "is 4", "lower it",
    ),
    "synthetic text without a place": bad("synthesize", "--seed 1", "output", "missing", "give it"),
    "synthetic text for a folder of others": bad(
        "synthesize", "--num_users 2 --num_texts 8 --num_files 1 --output WORLD", "output",
        "of other settings", "give another folder",
    ),
    "synthetic text for a URL": bad(
        "synthesize", "--output s3://bucket/x", "output", "s3://bucket/x", "give a folder",
    ),
    "a negative tail": bad(
        "synthesize", "--tail -1 --output TMP/out", "tail", "'-1'", "greater than or equal to 0",
    ),
    "a cohort larger than the fewest users": bad(
        "scale", f"{SCALE} --scale.cohort_size 20000", "cohort_size", "is 20000", "lower it",
        as_process=True,
    ),
    "a study of scale without its model": bad(
        "scale", f"{SCALE} --scale.model TMP/none", "scale.model", "TMP/none", "give the folder",
    ),
    "a kill after the last step": bad(
        "scale", f"{SCALE} --scale.training.kill_after 20", "kill_after", "is 20",
        "cannot be killed",
    ),
    "a delta of a study of scale that is too large": bad(
        "scale", f"{SCALE} --scale.training.delta 0.1", "delta", "is 0.1", "lower it",
    ),
    "training of users that no size has": bad(
        "scale", f"{SCALE} --scale.training.num_users 7", "training.num_users", "is 7",
        "give one of",
    ),
    "a study of scale in a folder of others": bad(
        "scale", "--config WORLD/scale.yaml --output WORLD/full", "output", "WORLD/full",
        "give another folder",
    ),
    "a study of scale at a URL": bad(
        "scale", "--config WORLD/scale.yaml --output s3://bucket/x", "output", "s3://bucket/x",
        "give a folder",
    ),
    "public text for pretraining that is missing": bad(
        "pretrain", "--input TMP/none.parquet --output TMP/out", "input", "none.parquet", "give",
    ),
    "no public text": bad(
        "pretrain", "--output TMP/out", "input", "is missing", "give it", as_process=True,
    ),
    "public text that is no parquet": bad(
        "pretrain", "--input WORLD/garbage.parquet --output TMP/out", "garbage.parquet",
        "cannot be read as parquet", "give",
    ),
    "public text without the column": bad(
        "pretrain", f"{PRETRAIN} --text_column body", "text_column", "'body'", "name",
    ),
    "public text that is numbers": bad(
        "pretrain", "--input WORLD/numbers.parquet --output TMP/out", "text_column", "int64",
        "name a column of text",
    ),
    "heads that do not divide the width": bad(
        "pretrain", f"{PRETRAIN} --width 100 --num_heads 3", "num_heads", "is 3", "change",
    ),
    "held-out text that is trained on": bad(
        "pretrain", f"{PRETRAIN} --heldout WORLD/public.parquet", "heldout", "public.parquet",
        "give another file",
    ),
    "too little text": bad(
        "pretrain", f"{PRETRAIN} --context_tokens 100000 --vocab_size 300", "context_tokens",
        "100000", "lower context_tokens",
    ),
    "held-out text that is missing": bad(
        "pretrain", f"{PRETRAIN} --heldout TMP/none.parquet", "heldout", "none.parquet", "give",
    ),
    "an output of a model that is not empty": bad(
        "pretrain", "--input WORLD/public.parquet --output WORLD/full", "output", "WORLD/full",
        "give another folder",
    ),
    "an output of a model that is a URL": bad(
        "pretrain", "--input WORLD/public.parquet --output s3://bucket/x", "output",
        "s3://bucket/x", "give a folder",
    ),
}  # fmt: skip

CASES: dict[str, BadInput] = {
    **FILES,
    **AUDITS,
    **PRICES,
    **TRAININGS,
    **SWEEPS,
    **PREPARATIONS,
    **LEDGERS,
    **VERIFICATIONS,
    **DRAINS,
    **PLANS,
    **STUDIES,
    **GENERATIONS,
    **OTHERS,
}
