"""How jobs read their settings, and how they refuse a mistake."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from udp_ray.config.base import Section
from udp_ray.config.cli import DRY_RUN, RESUME, Job, parse, run_job
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.errors import ConfigError

SETTINGS = """
privacy: {epsilon: 8, delta: 1.0e-5, clip_norm: 1.0, cohort_size: 20, num_steps: 5}
data: {name: chats, store: build/chats, input: chats.parquet}
model: {name: some-model}
output: out
"""


class OnlyPrivacy(Section):
    """What a job needs that takes no data."""

    privacy: PrivacyConfig


@pytest.fixture
def settings_file(tmp_path: Path) -> str:
    file = tmp_path / "settings.yaml"
    file.write_text(SETTINGS)
    return str(file)


def read(settings_file: str, *arguments: str) -> Job[ExperimentConfig]:
    return parse(
        ExperimentConfig, "A job.", ["--config", settings_file, *arguments], flags=(DRY_RUN, RESUME)
    )


def test_command_line_wins_over_the_file(settings_file: str) -> None:
    assert read(settings_file).config.privacy.clip_norm == 1.0
    assert read(settings_file, "--privacy.clip_norm", "0.5").config.privacy.clip_norm == 0.5


def test_null_takes_a_setting_of_the_file_back(settings_file: str) -> None:
    privacy = read(
        settings_file, "--privacy.epsilon", "null", "--privacy.noise_multiplier", "1.5"
    ).config.privacy
    assert (privacy.epsilon, privacy.noise_multiplier) == (None, 1.5)


def test_heldout_is_a_share_or_a_list_of_inputs(settings_file: str) -> None:
    assert read(settings_file, "--data.heldout", "0.1").config.data.heldout == 0.1
    assert read(settings_file, "--data.heldout", "a.csv").config.data.heldout == ["a.csv"]


def test_one_file_serves_a_job_that_takes_fewer_sections(settings_file: str) -> None:
    job = parse(OnlyPrivacy, "A job.", ["--config", settings_file])
    assert job.config.privacy.cohort_size == 20
    assert type(job.config) is OnlyPrivacy


def test_resolved_settings_read_back_as_the_same(settings_file: str, tmp_path: Path) -> None:
    config = read(settings_file, "--privacy.clip_norm", "0.5").config
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert read(str(again)).config == config


def test_environment_does_not_reach_the_settings(
    settings_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVACY", '{"clip_norm": 9}')
    monkeypatch.setenv("OUTPUT", "elsewhere")
    assert read(settings_file).config.output.endswith("/out")
    assert read(settings_file).config.privacy.clip_norm == 1.0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--privacy.clip_norm", "-1"], ["privacy.clip_norm", "-1", "greater than 0"]),
        (["--privacy.clip_norms", "1"], ["--privacy.clip_norms", "--help"]),
        (["--privacy.noise_multiplier", "1"], ["privacy.epsilon", "privacy.noise_multiplier"]),
        (["--privacy.epsilon", "nan"], ["privacy.epsilon", "nan"]),
        (["--privacy.delta", "0.1", "--privacy.population", "100"], ["privacy.delta", "0.1"]),
        (["--privacy.sampling", "els"], ["privacy.batch_size", "els"]),
        (["--privacy.batch_size", "9"], ["privacy.batch_size", "uls"]),
        (["--privacy.clip_norm", "inf"], ["privacy.clip_norm", "infinite"]),
        (["--privacy.population", "10"], ["privacy.cohort_size", "privacy.population"]),
        (["--data.heldout", "1.5"], ["data.heldout", "1.5", "between 0 and 1"]),
        (["--data.prompt_column", "p"], ["data.prompt_column", "data.response_column"]),
        (["--cluster.num_workers", "0"], ["cluster.num_workers", "0"]),
        (["--train.evaluate_every", "70"], ["train.evaluate_every", "train.checkpoint_every"]),
        (["--data.name", "a/b"], ["data.name", "a/b"]),
        (["--train.offload", "optimizer"], ["train.offload", "train.zero_stage"]),
        (
            ["--train.zero_stage", "3", "--train.kernel", "direct"],
            ["train.zero_stage", "train.kernel", "train.zero_stage 2"],
        ),
        (
            ["--train.zero_stage", "3", "--model.dropout", "0.1"],
            ["train.zero_stage", "model.dropout 0.1"],
        ),
        (
            ["--train.zero_stage", "3", "--train.microbatch_tokens", "255"],
            ["train.microbatch_tokens", "data.block_tokens", "privacy.group_size", "256"],
        ),
    ],
)
def test_a_mistake_is_one_sentence_that_names_field_and_value(
    settings_file: str, arguments: list[str], names: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        read(settings_file, *arguments)
    assert all(name in str(refused.value) for name in names), refused.value
    assert "\n" not in str(refused.value)


PLAIN = ["--privacy.secure_noise", "false"]
FUSED = ["--train.fuse_reduce", "true"]
TWO_WORKERS = ["--cluster.num_workers", "2"]


def test_noise_is_secure_unless_the_settings_say_otherwise(settings_file: str) -> None:
    assert read(settings_file).config.privacy.secure_noise
    assert not read(settings_file, *PLAIN).config.privacy.secure_noise


def test_secure_noise_with_a_fused_reduction_over_several_workers_is_refused(
    settings_file: str,
) -> None:
    with pytest.raises(ConfigError) as refused:
        read(settings_file, *FUSED, *TWO_WORKERS)
    for name in ("privacy.secure_noise", "cluster.num_workers 2", "set train.fuse_reduce false"):
        assert name in str(refused.value)
    for accepted in (FUSED, TWO_WORKERS, [*PLAIN, *FUSED, *TWO_WORKERS]):
        read(settings_file, *accepted)


def test_it_is_refused_for_the_trials_of_a_sweep_too(settings_file: str) -> None:
    asked = ["--config", settings_file, "--sweep.release", "all", *FUSED]
    assert parse(SweepJobConfig, "A job.", asked).config.privacy.secure_noise
    with pytest.raises(ConfigError, match=r"set train\.fuse_reduce false"):
        parse(SweepJobConfig, "A job.", [*asked, *TWO_WORKERS])


def test_an_option_of_one_value_is_given_once_and_a_list_as_often_as_it_has_values(
    settings_file: str,
) -> None:
    inputs = read(settings_file, "--data.input", "a.csv", "--data.input", "b.csv").config.data.input
    assert inputs == ["a.csv", "b.csv"]
    for repeated in (["--privacy.epsilon", "1", "--privacy.epsilon=2"], ["--config", "x"]):
        with pytest.raises(ConfigError, match="is given 2 times"):
            read(settings_file, *repeated)


def test_workers_are_a_number_or_a_range(settings_file: str, tmp_path: Path) -> None:
    for given, least, most in (("2", 2, 2), ("[2, 8]", 2, 8), ("[3,3]", 3, 3)):
        job = read(settings_file, "--cluster.num_workers", given)
        assert (job.config.cluster.least_workers, job.config.cluster.most_workers) == (least, most)
        loaded = ExperimentConfig.load(settings_file, [f"cluster.num_workers={given}"])
        assert loaded.cluster == job.config.cluster
        (tmp_path / "again.yaml").write_text(loaded.to_yaml())
        assert ExperimentConfig.load(tmp_path / "again.yaml") == loaded


@pytest.mark.parametrize(
    "given", ["[8, 2]", "[0, 4]", "[2]", "[]", "[1, 2, 3]", "[2, 2.5]", "2.5", "two", "-1", "2,8"]
)
def test_other_numbers_of_workers_are_one_sentence(settings_file: str, given: str) -> None:
    wanted = r"cluster\.num_workers is .*: give a whole number of at least 1, or a range"
    with pytest.raises(ConfigError, match=wanted) as refused:
        read(settings_file, "--cluster.num_workers", given)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=wanted):
        ExperimentConfig.load(settings_file, [f"cluster.num_workers={given}"])


def test_workers_given_twice_are_no_range(settings_file: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.num_workers is '2,4'"):
        read(settings_file, "--cluster.num_workers", "2", "--cluster.num_workers", "4")


def test_a_range_that_reaches_two_workers_counts_as_several(settings_file: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.num_workers 2: rank 0 would round"):
        read(settings_file, *FUSED, "--cluster.num_workers", "[1, 2]")
    assert read(settings_file, *FUSED, "--cluster.num_workers", "[1, 1]").config.train.fuse_reduce


@pytest.mark.parametrize("number", ["-1e-6", "-inf", "-3"])
def test_a_negative_number_is_a_value_and_not_an_option(settings_file: str, number: str) -> None:
    with pytest.raises(ConfigError, match=rf"privacy\.delta is '{number}'"):
        read(settings_file, "--privacy.delta", number)
    assert read(settings_file, "--privacy.seed", "-3").config.privacy.seed == -3


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("output: ''", "output: '' is an empty text"),
        ("output: '  '", "output: '  ' is an empty text"),
        ("data: {name: x, store: s, input: [a.csv, '']}", "data.input: '' is an empty text"),
        ("privacy: {num_steps: true}", "privacy.num_steps: true is not a value"),
        ("privacy: {epsilon: .inf}", "privacy.epsilon is inf: it must be a finite number"),
        ("train: {weight_decay: .nan}", "train.weight_decay is nan: it must be a finite number"),
        ("train: {betas: [0.9, 1.0]}", "train.betas.1 is 1.0"),
    ],
)
def test_what_no_field_can_mean_is_refused(tmp_path: Path, content: str, name: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as refused:
        read(str(file))
    assert name in str(refused.value)


def test_a_switch_may_be_true_and_a_clip_norm_infinite(settings_file: str) -> None:
    asked = ["--privacy.clip_norm", "inf", "--privacy.noise_multiplier", "0"]
    asked += ["--privacy.epsilon", "null", "--privacy.accept_no_guarantee", "true"]
    privacy = read(settings_file, *asked).config.privacy
    assert privacy.clip_norm == float("inf")
    assert privacy.accept_no_guarantee is True


def test_a_misspelling_is_answered_with_the_nearest_name(settings_file: str) -> None:
    for wrong, right in (
        ("--privacy.clip_norms", "did you mean --privacy.clip_norm?"),
        ("--dry-rum", "did you mean --dry-run?"),
    ):
        with pytest.raises(ConfigError) as refused:
            read(settings_file, wrong, "1")
        assert right in str(refused.value)
    for far in ("--zzz", "--privacy.sigma"):
        with pytest.raises(ConfigError) as refused:
            read(settings_file, far, "1")
        assert "did you mean" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("privacy: {epsilon: 1, epsilon: 2}", ["'epsilon' is given twice", "keep one"]),
        ("privacy: {}\ndata: {}\nprivacy: {}", ["'privacy' is given twice"]),
        ("privacy: {epsilon: 0, sigma: 1}", ["privacy.sigma", "not a known setting"]),
        ("privacy: {epsilon: 0}", ["privacy.epsilon is 0"]),  # and not that delta is missing
        ("privacy: [1]", ["section 'privacy' is [1]"]),
        ("privacy: [", ["not valid YAML"]),
        ("just text", ["holds no settings"]),
        ("privvacy: {}", ["privvacy", "privacy"]),
        ("privacy: {epsilon: 1}", ["privacy.delta is missing"]),
        ("output: x", ["section 'privacy' is missing"]),
        ("privacy: {sigma: 1}", ["privacy.sigma", "not a known setting"]),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(
    tmp_path: Path, content: str, names: list[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as refused:
        read(str(file))
    assert all(name in str(refused.value) for name in names), refused.value


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no-such\.yaml"):
        read("no-such.yaml")


def test_no_noise_wants_to_be_accepted_by_name(settings_file: str) -> None:
    bare = ["--privacy.epsilon", "null", "--privacy.noise_multiplier", "0"]
    with pytest.raises(ConfigError, match="accept_no_guarantee"):
        read(settings_file, *bare)
    accepted = read(settings_file, *bare, "--privacy.accept_no_guarantee", "true").config
    assert accepted.privacy.noise_multiplier == 0


def test_digest_changes_with_what_a_step_releases_and_with_nothing_else(settings_file: str) -> None:
    digest = read(settings_file).config.digest()
    for same in (
        ["--train.zero_stage", "3"],
        ["--train.activation_checkpointing", "true"],
        ["--cluster.num_workers", "4"],
        ["--cluster.num_workers", "[2, 8]"],
        ["--output", "x"],
    ):
        assert read(settings_file, *same).config.digest() == digest, same
    for other in (
        ["--train.learning_rate", "9"],
        ["--privacy.clip_norm", "9"],
        ["--model.lora.rank", "9"],
    ):
        assert read(settings_file, *other).config.digest() != digest, other


@pytest.mark.parametrize("rough", [["--model.autocast", "bfloat16"], ["--model.dropout", "0.1"]])
def test_where_kernels_round_visibly_the_digest_holds_what_decides_it(
    settings_file: str, rough: list[str]
) -> None:
    deciding = [
        ["--train.kernel", "direct"],
        ["--train.microbatch_tokens", "4096"],
        ["--cluster.use_gpu", "true"],
    ]
    exact, rounded = read(settings_file).config.digest(), read(settings_file, *rough).config
    for change in deciding:
        assert read(settings_file, *change).config.digest() == exact, change
        assert read(settings_file, *rough, *change).config.digest() != rounded.digest(), change
    for same in (
        ["--cluster.num_workers", "4"],
        ["--train.zero_stage", "2"],
        ["--train.checkpoint_every", "7"],
    ):
        assert read(settings_file, *rough, *same).config.digest() == rounded.digest(), same


def test_where_noise_is_drawn_on_a_gpu_is_part_of_the_release(settings_file: str) -> None:
    """Its last bits are a device's own; the same noise in host memory is drawn again on any."""
    on_cpu = read(settings_file).config.digest()
    gpu, auto = ["--cluster.use_gpu", "true"], ["--train.noise_device", "auto"]
    plain = ["--privacy.secure_noise", "false"]
    assert read(settings_file, *gpu, *auto).config.digest() != on_cpu
    assert read(settings_file, *gpu).config.digest() == on_cpu
    assert read(settings_file, *auto).config.digest() == on_cpu
    on_plain = read(settings_file, *plain).config.digest()
    assert read(settings_file, *gpu, *auto, *plain).config.digest() == on_plain


def test_no_noise_is_drawn_ahead_in_host_memory_where_a_gpu_draws_it(settings_file: str) -> None:
    train = read(settings_file, "--train.noise_device", "auto").config.train
    assert train.noise_buffer_bytes(use_gpu=True, is_secure=True) == 0
    assert train.noise_buffer_bytes(use_gpu=True, is_secure=False) == 2**30
    assert train.noise_buffer_bytes(use_gpu=False, is_secure=True) == 2**26
    host = read(settings_file).config.train
    assert host.noise_buffer_bytes(use_gpu=True, is_secure=True) == 2**30


def test_under_autocast_slices_are_another_release(settings_file: str) -> None:
    rough = ["--model.autocast", "bfloat16"]
    whole, sliced = (
        read(settings_file, *rough, "--train.zero_stage", stage).config.digest()
        for stage in ("2", "3")
    )
    assert whole != sliced


def test_a_users_mistake_exits_with_two_and_no_traceback() -> None:
    program = """
        from udp_ray.config.cli import run_job
        from udp_ray.errors import DataError
        def main():
            raise DataError("data.user_column 'who' is not in the input")
        run_job(main)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: data.user_column 'who' is not in the input\n"


STOPPED = """
    import signal
    from udp_ray.config.cli import run_job
    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            print("cleaned up", flush=True)
    run_job(main)
"""


def test_sigterm_lets_a_job_clean_up_and_exits_with_143() -> None:
    program = textwrap.dedent(STOPPED)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleaned up\n", "terminated\n")


def test_an_interrupt_exits_with_130() -> None:
    # A program that a shell starts in the background ignores SIGINT, and so do its children.
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program = listens + textwrap.dedent(STOPPED).replace("SIGTERM", "SIGINT")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "interrupted\n")


def test_another_exit_status_of_a_job_stays() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_job(lambda: sys.exit(7))
    assert end.value.code == 7
    assert signal.getsignal(signal.SIGTERM) is before
