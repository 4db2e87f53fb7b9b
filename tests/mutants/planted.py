"""The planted defects: one exact replacement each, and the tests that must notice it.

Most were tried by an adversarial review of this code ("review"), the rest are ways in which other
projects went wrong (P4 is row 4 of the list of pitfalls). `run.py` plants them; how to add one:
copy a short text that stands once in its file, replace it, and name the fastest test that must
fail. A defect that changes nothing observable is argued in a comment and left out.

Left out as equivalent:
  - `BEGIN` in place of `BEGIN IMMEDIATE`: SQLite then refuses the second of two writers (a busy
    snapshot) instead of letting both spend; the driver sees an error and nothing is overspent.
  - Norms below 1e-8 from squares in float32: torch 2.13 adds the squares of a row in float64 on a
    CPU, which it does not promise.
  - Adding the noise before the ranks' sums are reduced, without secure noise: the same distribution
    (that is `train.fuse_reduce`).
"""

from __future__ import annotations

from tests.mutants.run import Mutant

LOOP = "tests/guarantee/test_loop_against_plan.py"
THEN_BOUND = "\n\n    @property\n    def clip_bound"
TRAINER = "tests/engine/test_trainer.py"
ACCUMULATION = "tests/guarantee/test_accumulation.py"
NOISE_AND_DIVISOR = f"{LOOP}::test_noise_divisor_and_number_of_steps_are_the_plans"
GHOST_SUM = "tests/engine/kernels/test_ghost.py::test_the_sum_is_that_of_a_plain_loop_over_users"
GHOST_NORM = "summed_squared_norms(gradients.values())"


def _left_out_of_the_norm(words: str) -> str:
    return f"summed_squared_norms(g for n, g in gradients.items() if {words!r} not in n)"


CLIPPING = [
    Mutant(
        name="no_clip_above_one_microbatch",
        breaks="review: a user of several microbatches is not clipped",
        file="udp_ray/engine/kernels/direct.py",
        text="clip_and_add(views, gradient, bound,",
        replacement="clip_and_add(views, gradient,"
        " bound if len(group.microbatches) == 1 else float('inf'),",
        tests=(
            "tests/engine/kernels/test_direct.py::test_the_sum_is_that_of_a_plain_loop_over_users[13-0.1]",
        ),
    ),
    Mutant(
        name="ghost_does_not_clip",
        breaks="P30: the clip norm of the settings is not applied",
        file="udp_ray/engine/kernels/ghost.py",
        text="self._factor_by(norms, bound)",
        replacement="self._factor_by(norms, float('inf'))",
        tests=(GHOST_SUM,),
    ),
    Mutant(
        name="automatic_clipping_above_the_norm",
        breaks="automatic clipping leaves gradients longer than the clip norm",
        file="udp_ray/dp/clipping.py",
        text="(norm + AUTOMATIC_SHARE * clip_norm)",
        replacement="(norm - AUTOMATIC_SHARE * clip_norm).abs()",
        tests=("tests/dp/test_adaptive.py::test_automatic_clipping_bounds_every_gradient",),
    ),
    Mutant(
        name="adaptive_clipping_in_shared_passes",
        breaks="adaptive clipping: a longer text changes how many other users count as unclipped",
        file="udp_ray/engine/kernels/select.py",
        text="        require_separate_passes(kernel=wanted, is_sliced=is_sliced)\n"
        '        wanted = "direct"\n',
        replacement="        pass\n",
        tests=(
            "tests/equivalence/test_adaptive_clipping.py"
            "::test_a_kernel_in_which_users_share_a_pass_is_refused",
        ),
    ),
    Mutant(
        name="bias_outside_the_norm",
        breaks="review: biases are added to the sum and not counted in the norm",
        file="udp_ray/engine/kernels/ghost.py",
        text=GHOST_NORM,
        replacement=_left_out_of_the_norm("bias"),
        tests=(GHOST_SUM,),
    ),
    Mutant(
        name="layer_norm_outside_the_norm",
        breaks="review: LayerNorm is added to the sum and not counted in the norm",
        file="udp_ray/engine/kernels/ghost.py",
        text=GHOST_NORM,
        replacement=_left_out_of_the_norm(".ln_"),
        tests=(GHOST_SUM,),
    ),
    Mutant(
        name="tied_weight_outside_the_norm",
        breaks="review: the tied embedding is added to the sum and not counted in the norm",
        file="udp_ray/engine/kernels/ghost.py",
        text=GHOST_NORM,
        replacement=_left_out_of_the_norm("wte"),
        tests=(GHOST_SUM,),
    ),
    Mutant(
        name="tied_weight_without_its_cross_term",
        breaks="P16: the norm of a weight used twice is not the norm of its parts",
        file="udp_ray/engine/kernels/gradients.py",
        text=" + 2 * cross",
        replacement="",
        tests=(
            "tests/engine/kernels/test_gradients.py"
            "::test_the_norm_of_a_tied_table_is_never_too_small",
        ),
    ),
    Mutant(
        name="second_lora_matrix_outside_the_norm",
        breaks="review: B of an adapter is added to the sum and not counted in the norm",
        file="udp_ray/engine/kernels/ghost.py",
        text=GHOST_NORM,
        replacement=_left_out_of_the_norm("lora_B"),
        tests=("tests/engine/kernels/test_ghost.py::test_adapters_are_clipped_exactly_and_alone",),
    ),
    Mutant(
        name="first_parameter_outside_the_norm",
        breaks="P19: the direct kernel's norm leaves out a parameter",
        file="udp_ray/dp/clipping.py",
        text="norm = _norm_by_rows(grads)",
        replacement="norm = _norm_by_rows(grads[1:])",
        tests=("tests/dp/test_clipping.py::test_the_norm_is_that_of_all_parameters_together",),
    ),
    Mutant(
        name="norm_in_bfloat16",
        breaks="P15: the norm is rounded, and the bound exceeded by 1 %",
        file="udp_ray/dp/clipping.py",
        text="table.view(num_rows, ROW_VALUES), dim=1)",
        replacement="table.view(num_rows, ROW_VALUES).bfloat16(), dim=1)",
        tests=("tests/dp/test_clipping.py::test_the_norm_is_that_of_all_parameters_together",),
    ),
    Mutant(
        name="rows_too_long_for_the_margin",
        breaks="a norm is too small by more than the margin allows, and the bound is exceeded",
        file="udp_ray/dp/clipping.py",
        text="ROW_VALUES = 24",
        replacement="ROW_VALUES = 4096",
        tests=(
            "tests/dp/test_clipping.py"
            "::test_the_margin_covers_the_roundings_that_its_comment_counts",
        ),
    ),
    Mutant(
        name="no_rounding_margin",
        breaks="review: clipped groups exceed the bound by their rounding",
        file="udp_ray/dp/clipping.py",
        text="ROUNDING_MARGIN = 2.0**-20",
        replacement="ROUNDING_MARGIN = 0.0",
        tests=(
            "tests/dp/test_clipping.py"
            "::test_a_clipped_gradient_in_float32_never_exceeds_the_clip_norm",
        ),
    ),
    Mutant(
        name="no_slack_in_norms_of_float32_sums",
        breaks="squares added in float32 give a norm that is too small",
        file="udp_ray/dp/clipping.py",
        text="norm.square() * (1 + (NORM_TERMS + 4) * 2.0**-24)",
        replacement="norm.square()",
        tests=("tests/dp/test_clipping.py::test_squared_norms_are_never_too_small",),
    ),
    Mutant(
        name="pairs_of_tokens_counted_once",
        breaks="a norm in the Gram form leaves out half of the pairs of different tokens",
        file="udp_ray/engine/kernels/gradients.py",
        text="        pairs[:, :, width:] *= 2\n",
        replacement="",
        tests=("tests/engine/kernels/test_gradients.py::test_a_gram_norm_is_never_too_small",),
    ),
    Mutant(
        name="truncation_of_tensor_cores_ignored",
        breaks="P15: norms from tensor cores are too small",
        file="udp_ray/engine/kernels/products.py",
        text="return share if",
        replacement="return 0.0 if",
        tests=(
            "tests/engine/kernels/test_products.py"
            "::test_a_sum_that_truncates_leaves_no_norm_too_small",
        ),
    ),
    Mutant(
        name="truncation_of_the_whole_sum_ignored",
        breaks="review: of many tokens a Gram norm from tensor cores is too small",
        file="udp_ray/engine/kernels/gradients.py",
        text="(total_U * (1 + truncated))",
        replacement="total_U",
        tests=(
            "tests/engine/kernels/test_products.py"
            "::test_a_sum_that_truncates_leaves_no_norm_too_small",
        ),
    ),
    Mutant(
        name="clipped_values_split_in_two",
        breaks="P14: values are rounded to 16 bits after clipping, before their product",
        file="udp_ray/engine/kernels/products.py",
        text="return first, second, (rest - second.float()).bfloat16()",
        replacement="return first, second, torch.zeros_like(second)",
        tests=("tests/engine/kernels/test_products.py",),
    ),
    Mutant(
        name="no_slack_in_gram_norms",
        breaks="review: a norm in the Gram form comes out too small where tokens cancel",
        file="udp_ray/engine/kernels/gradients.py",
        text="GRAM_SLACK = 2.0**-19",
        replacement="GRAM_SLACK = 0.0",
        tests=("tests/engine/kernels/test_gradients.py::test_a_gram_norm_is_never_too_small",),
    ),
    Mutant(
        name="not_finite_gradients_let_through",
        breaks="P28: a gradient with a NaN reaches the sum",
        file="udp_ray/dp/clipping.py",
        text="torch.where(torch.isfinite(norm), factor, torch.zeros_like(norm))",
        replacement="factor.nan_to_num(nan=1.0)",
        tests=("tests/dp/test_clipping.py",),
    ),
    Mutant(
        name="clip_weighted_sum_in_bfloat16",
        breaks="P14: the sum over users is rounded to bfloat16 after clipping",
        file="udp_ray/engine/kernels/gradients.py",
        text="accumulate(total, summed_outer(some_rows, some_columns))",
        replacement="accumulate(total, summed_outer(some_rows, some_columns).bfloat16().float())",
        tests=(GHOST_SUM,),
    ),
    Mutant(
        name="users_padded_to_their_company",
        breaks="P42: under autocast a user's gradient depends on who shares the pass",
        file="udp_ray/engine/kernels/ghost.py",
        text='None if self._autocast == "off" else LENGTH_GRID',
        replacement="None",
        tests=(
            "tests/engine/kernels/test_ghost.py"
            "::test_under_autocast_a_users_gradient_does_not_depend_on_who_shares",
        ),
    ),
    Mutant(
        name="sum_over_examples_instead_of_mean",
        breaks="review, P34: a user of many examples weighs more, and another loss is trained",
        file="udp_ray/data/batches.py",
        text="weight=1 / len(examples)",
        replacement="weight=1.0",
        tests=("tests/data/test_cohort.py",),
    ),
    Mutant(
        name="padding_counts_in_the_loss",
        breaks="P17: padding tokens carry loss",
        file="udp_ray/data/batches.py",
        text="labels = np.full(shape, NO_LOSS, dtype=np.int64)",
        replacement="labels = np.full(shape, self._pad_id, dtype=np.int64)",
        tests=("tests/data/test_cohort.py",),
    ),
    Mutant(
        name="rows_lost_where_a_group_is_divided",
        breaks="the last examples of a group of several microbatches are left out",
        file="udp_ray/data/batches.py",
        text="for start, end in pairwise([0, *ends])]",
        replacement="for start, end in pairwise([0, *(ends[:-1] or ends)])]",
        tests=(
            "tests/data/test_cohort.py"
            "::test_microbatches_hold_each_example_once_and_stay_within_their_tokens",
        ),
    ),
    Mutant(
        name="replace_one_priced_as_add_or_remove",
        breaks="P35: the sensitivity of another adjacency",
        file="udp_ray/dp/sensitivity.py",
        text="return 2 * clip_norm",
        replacement="return clip_norm",
        tests=("tests/dp/test_clipping.py::test_replacing_one_user_counts_twice",),
    ),
]

NOISE = [
    Mutant(
        name="noise_divided_by_sqrt_of_world",
        breaks="review, P11: each of several workers is trusted with a share of the noise",
        file="udp_ray/engine/loop.py",
        text="fresh_noise(key, self.plan, self.settings, self.world.device)",
        replacement="fresh_noise(key, self.plan, self.settings, self.world.device).with_stddev("
        "self.plan.fresh_noise_stddev / self.world.size**0.5)",
        tests=(f"{LOOP}::test_two_ranks_share_the_groups_and_none_is_with_both",),
    ),
    Mutant(
        name="noise_divided_by_sqrt_of_world_in_the_sum",
        breaks="review, P11: the same, where the noise is added",
        file="udp_ray/engine/gradient_sum.py",
        text="values.to(flat.device)",
        replacement="values.to(flat.device) / self._world.size**0.5",
        tests=(
            "tests/engine/test_noise_check.py::test_a_sound_step_passes_at_every_stage[2 ranks]",
        ),
    ),
    Mutant(
        name="noise_halved_after_the_check",
        breaks="review: the start-up check sees other noise than the steps get",
        file="udp_ray/engine/step.py",
        text="        with self._ahead.drawing(self._noise, step) as noise:\n",
        replacement="        if self._noise is not None:\n"
        "            self._noise.noise_stddev = self.plan.fresh_noise_stddev / 2\n"
        "        with self._ahead.drawing(self._noise, step) as noise:\n",
        tests=(NOISE_AND_DIVISOR,),
    ),
    Mutant(
        name="noise_drawn_where_other_noise_is",
        breaks="review: drawn noise is misplaced, and the start-up check draws elsewhere",
        file="udp_ray/dp/noise_ahead.py",
        text="out=self._memory[first:last],",
        replacement="out=self._memory[: last - first],",
        tests=(
            "tests/engine/test_noise_check.py::test_a_sound_step_passes_at_every_stage[1 ranks]",
        ),
    ),
    Mutant(
        name="noise_repeated_between_steps",
        breaks="review, P13: every step gets the noise of the first",
        file="udp_ray/dp/noise_ahead.py",
        text="self._step, name, numel, start=start",
        replacement="1, name, numel, start=start",
        tests=("tests/engine/test_step.py::test_the_noise_of_two_steps_differs",),
    ),
    Mutant(
        name="noise_restarted_on_resume",
        breaks="review: a resumed run repeats the noise of its first steps",
        file="udp_ray/engine/loop.py",
        text="self.private_step.run(self.step + 1,",
        replacement="self.private_step.run("
        "self.step + 1 - (self.resume.step if self.resume else 0),",
        tests=(
            "tests/engine/test_loop.py"
            "::test_a_run_resumed_from_its_checkpoint_ends_with_the_same_bits",
        ),
    ),
    Mutant(
        name="noise_added_twice",
        breaks="review: a multiple of the noise that was priced",
        file="udp_ray/engine/step.py",
        text="        self._sum.add_noise(noise, step)\n",
        replacement="        self._sum.add_noise(noise, step)\n"
        "        self._sum.add_noise(noise, step)\n",
        tests=(NOISE_AND_DIVISOR,),
    ),
    Mutant(
        name="no_noise_in_steps",
        breaks="P27: the hook that adds the noise does not run, and training goes on",
        file="udp_ray/engine/step.py",
        text="            mean = self._noisy_mean(noise, step)\n",
        replacement="            mean = self._noisy_mean(None, step)\n",
        tests=(NOISE_AND_DIVISOR,),
    ),
    Mutant(
        name="noise_on_the_mean",
        breaks="P1: noise of z C on the mean, so M times too little on the sum",
        file="udp_ray/dp/plan.py",
        text="return _noise_stddev(self.gradient_noise_multiplier, clip_norm)",
        replacement="return self.noise_multiplier * clip_norm / self.expected_size",
        tests=("tests/dp/test_plan.py::test_rate_divisor_and_noise_come_from_public_numbers",),
    ),
    Mutant(
        name="gradient_noise_ignores_the_count",
        breaks="P18: the noisy count of adaptive clipping is released without being paid for",
        file="udp_ray/dp/adaptive.py",
        text="square = total * count / (count - total)",
        replacement="square = total * count / count",
        tests=(
            "tests/guarantee/test_adaptive_clipping.py"
            "::test_sum_and_count_together_cost_what_the_plan_says",
        ),
    ),
    Mutant(
        name="count_noise_halved",
        breaks="P18: the count of adaptive clipping has less noise than was priced",
        file="udp_ray/engine/clip_norm.py",
        text="self._plan.count_noise)",
        replacement="self._plan.count_noise / 2)",
        tests=(
            "tests/guarantee/test_adaptive_clipping.py::test_the_count_has_the_noise_of_the_plan",
        ),
    ),
    Mutant(
        name="noise_of_the_first_clip_norm",
        breaks="P18: the noise stays that of the first clip norm while gradients grow",
        file="udp_ray/engine/clip_norm.py",
        text="        return noise.with_stddev(self.noise_stddev)\n",
        replacement="        return noise\n",
        tests=(
            "tests/guarantee/test_adaptive_clipping.py"
            "::test_the_noise_of_a_step_has_the_scale_of_its_own_clip_norm",
        ),
    ),
    Mutant(
        name="clip_norm_forgotten_on_resume",
        breaks="a resumed run clips to the first clip norm again: its repeated steps are others",
        file="udp_ray/engine/loop.py",
        text="            self.private_step.restore(saved.clip_norm)\n",
        replacement="            pass\n",
        tests=(
            "tests/equivalence/test_adaptive_clipping.py"
            "::test_a_killed_run_continues_with_the_clip_norm_of_its_checkpoint[1-0]",
        ),
    ),
    Mutant(
        name="noise_in_bfloat16",
        breaks="P14: a coarse grid of noise, through which single values shine",
        file="udp_ray/dp/noise.py",
        text="            out *= _rounded_up(self.noise_stddev)\n",
        replacement="            out *= _rounded_up(self.noise_stddev)\n"
        "            out[:] = torch.from_numpy(out).bfloat16().float().numpy()\n",
        tests=("tests/guarantee/test_noise.py::test_noise_lies_on_no_coarse_grid",),
    ),
    Mutant(
        name="noise_before_the_sum_has_arrived",
        breaks="the ranks' sums overwrite noise that was added while they were on their way",
        file="udp_ray/engine/gradient_sum.py",
        text="self._wait_until(int(view.storage_offset()) + start + values.numel())",
        replacement="self._wait_until(0)",
        tests=(
            "tests/engine/test_gradient_sum.py"
            "::test_noise_is_added_to_what_has_arrived_and_to_all_of_it_once",
        ),
    ),
    Mutant(
        name="noise_of_the_slice_of_rank_0_only",
        breaks="P11: under ZeRO 3 the slices of other ranks get none",
        file="udp_ray/engine/gradient_sum.py",
        text="dist.send(piece.contiguous(), dst=rank)",
        replacement="dist.send(torch.zeros_like(piece), dst=rank)",
        tests=(
            "tests/engine/test_gradient_sum.py"
            "::test_slices_put_together_are_the_sum_over_ranks_with_the_noise_once",
        ),
    ),
    Mutant(
        name="secure_noise_not_drawn",
        breaks="P38: the settings ask for secure noise and the plain one is drawn",
        file="udp_ray/engine/loop.py",
        text="stddev, is_secure = plan.fresh_noise_stddev, plan.secure_noise",
        replacement="stddev, is_secure = plan.fresh_noise_stddev, False",
        tests=(f"{LOOP}::test_secure_noise_is_drawn_where_the_plan_says_so",),
    ),
    Mutant(
        name="secure_noise_of_one_draw",
        breaks="P38: a single draw of 53 bits stands behind each secure value",
        file="udp_ray/dp/noise.py",
        text="DRAWS = 4\n",
        replacement="DRAWS = 1\n",
        tests=(
            "tests/dp/test_secure_noise.py::test_each_value_is_four_draws_by_box_and_muller_over_two",
        ),
    ),
    Mutant(
        name="device_noise_of_half_the_rounds",
        breaks="P38: the cipher behind a device's noise has ten rounds of twenty",
        file="udp_ray/dp/noise_device.py",
        text="_DOUBLE_ROUNDS = 10\n",
        replacement="_DOUBLE_ROUNDS = 5\n",
        tests=("tests/dp/test_noise_device.py::test_blocks_are_those_of_the_standard",),
    ),
    Mutant(
        name="device_noise_repeats_its_counter",
        breaks="P13: each part of a chunk that a device draws is the first one",
        file="udp_ray/dp/noise_device.py",
        text="        key, first * _BLOCKS_PER_BLOCK, (last",
        replacement="        key, 0 * _BLOCKS_PER_BLOCK, (last",
        tests=("tests/dp/test_noise_device.py::test_any_slice_has_the_bits_of_the_whole",),
    ),
    Mutant(
        name="device_noise_of_a_shorter_key",
        breaks="P38: half of the key's bytes do not enter the noise of a device",
        file="udp_ray/dp/noise_device.py",
        text='secret = np.frombuffer(key, dtype="<i4")',
        replacement='secret = np.frombuffer(key[:16] + bytes(16), dtype="<i4")',
        tests=("tests/dp/test_noise_device.py::test_any_blocks_have_the_bits_of_the_hosts_stream",),
    ),
    Mutant(
        name="place_of_noise_not_in_the_release",
        breaks="a step drawn on a GPU is repeated in host memory for free: two releases",
        file="udp_ray/config/experiment.py",
        text='            kept["noise_device"] = "gpu"\n',
        replacement="            pass\n",
        tests=(
            "tests/config/test_cli.py::test_where_noise_is_drawn_on_a_gpu_is_part_of_the_release",
        ),
    ),
    Mutant(
        name="noise_check_trusts_the_device",
        breaks="the noise check compares a device's noise with itself",
        file="udp_ray/engine/noise_check.py",
        text="None if noise is None else noise.on_host()",
        replacement="noise",
        tests=("tests/engine/test_noise_check.py::test_faulty_noise_is_refused",),
    ),
    Mutant(
        name="drawn_noise_left_in_memory",
        breaks="P38: noise that can be subtracted stays in memory after its step",
        file="udp_ray/dp/noise_ahead.py",
        text="                self._memory.zero_()\n",
        replacement="                pass\n",
        tests=("tests/dp/test_noise_ahead.py::test_no_noise_and_no_thread_outlives_a_step",),
    ),
    Mutant(
        name="failed_draw_of_noise_ignored",
        breaks="P38: where a thread fails, zeros or old noise are added in place of noise",
        file="udp_ray/dp/noise_ahead.py",
        text="        return piece.values.result()\n",
        replacement="        piece.values.exception()\n"
        "        return self._memory[piece.first : piece.last]\n",
        tests=("tests/dp/test_noise_ahead.py::test_an_error_of_a_thread_is_one_of_the_step",),
    ),
    Mutant(
        name="divisor_realized",
        breaks="review, P1: the sum is divided by how many groups came",
        file="udp_ray/engine/step.py",
        text="            balance = self._kernel.add_clipped("
        "self._sum, groups, self.clip_norm.bound)\n"
        "            mean = self._noisy_mean(noise, step)\n"
        "        if self.observer is not None:\n"
        "            self._observe(self.observer, mean)\n"
        "        self.engine.apply(mean, step)\n",
        replacement="            groups = list(groups)\n"
        "            balance = self._kernel.add_clipped("
        "self._sum, groups, self.clip_norm.bound)\n"
        "            mean = self._noisy_mean(noise, step)\n"
        "        share = self.plan.divisor / max(1, len(groups))\n"
        "        self.engine.apply({name: share * part for name, part in mean.items()}, step)\n",
        tests=(NOISE_AND_DIVISOR,),
    ),
    Mutant(
        name="sum_not_cleared",
        breaks="review, P31: the sum of earlier steps is in the next, again and again",
        file="udp_ray/engine/step.py",
        text="            self._sum.clear()\n            balance",
        replacement="            balance",
        tests=(NOISE_AND_DIVISOR,),
    ),
    Mutant(
        name="empty_cohort_skipped",
        breaks="P4: a step without users adds no noise, which tells that there were none",
        file="udp_ray/engine/step.py",
        text="        with self._ahead.drawing(self._noise, step) as noise:\n",
        replacement="        if not list(groups):\n"
        "            return\n"
        "        with self._ahead.drawing(self._noise, step) as noise:\n",
        tests=(f"{LOOP}::test_a_step_whose_draw_is_empty_is_taken_and_noised_like_any_other",),
    ),
    Mutant(
        name="gradient_clipping_of_deepspeed",
        breaks="P27: DeepSpeed clips the noisy mean",
        file="udp_ray/engine/zero.py",
        text='"gradient_clipping": 0.0,',
        replacement='"gradient_clipping": 1.0,',
        tests=("tests/engine/test_step.py::test_the_noise_of_two_steps_differs",),
    ),
    Mutant(
        name="check_of_the_noise_left_out",
        breaks="review: a run begins without the start-up check",
        file="udp_ray/engine/loop.py",
        text="check_noise(self.private_step, self._noise(self.keys.selfcheck))",
        replacement="self._noise(self.keys.selfcheck)",
        tests=(f"{LOOP}::test_wrong_noise_stops_a_run_before_anything_is_read_or_asked_for",),
    ),
    Mutant(
        name="check_of_the_noise_left_out_on_resume",
        breaks="review: a resumed run goes on without the start-up check",
        file="udp_ray/engine/loop.py",
        text="        check_noise(self.private_step",
        replacement="        if saved is None:\n            check_noise(self.private_step",
        tests=(f"{LOOP}::test_wrong_noise_stops_a_run_before_anything_is_read_or_asked_for",),
    ),
    Mutant(
        name="check_with_the_noise_of_the_run",
        breaks="the noise of the check is also that of the run",
        file="udp_ray/engine/loop.py",
        text="self._noise(self.keys.selfcheck)",
        replacement="self._noise(self.keys.noise)",
        tests=(f"{LOOP}::test_the_check_draws_from_a_key_of_its_own_before_the_first_step",),
    ),
    Mutant(
        name="one_key_for_check_and_noise",
        breaks="two purposes share one stream of noise",
        file="udp_ray/dp/keys.py",
        text='self.derive("selfcheck")',
        replacement='self.derive("noise")',
        tests=("tests/dp/test_keys.py::test_no_value_repeats_over_purposes_steps_and_keys",),
    ),
    Mutant(
        name="keys_that_can_be_guessed",
        breaks="P38: anyone who knows the key subtracts the noise",
        file="udp_ray/dp/keys.py",
        text="secrets.token_bytes(SECRET_BYTES)",
        replacement="bytes(SECRET_BYTES)",
        tests=("tests/dp/test_keys.py::test_generated_keys_differ_and_seeded_keys_repeat",),
    ),
    Mutant(
        name="noise_key_for_every_rank",
        breaks="P11: every worker could add the noise, or subtract it",
        file="udp_ray/dp/keys.py",
        text="noise=self.noise() if is_first else None",
        replacement="noise=self.noise()",
        tests=("tests/on_ray/test_accountant.py::test_only_rank_0_gets_the_noise_key",),
    ),
    Mutant(
        name="key_in_the_checkpoint",
        breaks="P38: a checkpoint holds the key in place of its public name",
        file="udp_ray/engine/loop.py",
        text="key_id=self.keys.key_id,\n            provenance=",
        replacement="key_id=self.keys.sampling.secret.hex(),\n            provenance=",
        tests=(f"{LOOP}::test_no_key_is_in_a_checkpoint",),
    ),
]

SAMPLING = [
    Mutant(
        name="els_rate",
        breaks="review: the loop samples examples with 1.2 p",
        file="udp_ray/engine/loop.py",
        text="PoissonExampleSampler(\n            key,\n"
        "            sampling_probability=plan.sampling_probability,",
        replacement="PoissonExampleSampler(\n            key,\n"
        "            sampling_probability=1.2 * plan.sampling_probability,",
        tests=(f"{LOOP}::test_the_loop_samples_at_the_rate_that_the_event_charges_for",),
    ),
    Mutant(
        name="uls_rate",
        breaks="review: the loop samples users with 1.2 q",
        file="udp_ray/engine/loop.py",
        text="PoissonUserSampler(\n        key,\n"
        "        sampling_probability=plan.sampling_probability,",
        replacement="PoissonUserSampler(\n        key,\n"
        "        sampling_probability=1.2 * plan.sampling_probability,",
        tests=(f"{LOOP}::test_the_loop_samples_at_the_rate_that_the_event_charges_for",),
    ),
    Mutant(
        name="rate_from_the_users_in_the_store",
        breaks="P2, P3: the rate depends on the private number of users",
        file="udp_ray/engine/loop.py",
        text="PoissonUserSampler(\n        key,\n"
        "        sampling_probability=plan.sampling_probability,",
        replacement="PoissonUserSampler(\n        key,\n"
        "        sampling_probability=plan.expected_size / store.num_users,",
        tests=(f"{LOOP}::test_the_loop_samples_at_the_rate_that_the_event_charges_for",),
    ),
    Mutant(
        name="cap_left_out_of_the_loop",
        breaks="the cap is priced and not applied",
        file="udp_ray/engine/loop.py",
        text="max_cohort_size=plan.max_cohort_size,",
        replacement="max_cohort_size=None,",
        tests=("tests/engine/test_cohorts.py::test_a_cap_of_the_plan_bounds_every_cohort",),
    ),
    Mutant(
        name="cap_keeps_the_first_users",
        breaks="review: users who stand first in the store are never cut",
        file="udp_ray/dp/sampling.py",
        text='kept, _ = subsets(_Stream(key, "survivors", step), np.array([num_drawn]),'
        " max_cohort_size)",
        replacement="kept = np.arange(min(num_drawn, max_cohort_size))",
        tests=("tests/dp/test_sampling.py::test_the_cap_treats_all_users_alike",),
    ),
    Mutant(
        name="els_keeps_twice_the_group_size",
        breaks="review: users keep 2 G examples",
        file="udp_ray/dp/sampling.py",
        text='(_Stream(key, "kept", 0), np.diff(user_offsets), group_size)',
        replacement='(_Stream(key, "kept", 0), np.diff(user_offsets), 2 * group_size)',
        tests=(
            "tests/dp/test_sampling.py"
            "::test_example_sampling_keeps_the_same_examples_for_the_whole_run",
        ),
    ),
    Mutant(
        name="els_keeps_everything",
        breaks="the bound on a user's examples is applied to no one",
        file="udp_ray/dp/sampling.py",
        text='(_Stream(key, "kept", 0), np.diff(user_offsets), group_size)',
        replacement='(_Stream(key, "kept", 0), np.diff(user_offsets), int(user_offsets[-1]) + 1)',
        tests=(f"{LOOP}::test_a_user_brings_distinct_examples_and_no_more_than_the_group_size",),
    ),
    Mutant(
        name="fixed_size_cohorts",
        breaks="P7: cohorts of a fixed size, priced as Poisson",
        file="udp_ray/dp/sampling.py",
        text="users = poisson("
        '_Stream(self._key, "users", step), len(user_offsets) - 1, self._probability)',
        replacement="num_users = len(user_offsets) - 1\n"
        '        users, _ = subsets(_Stream(self._key, "users", step), np.array([num_users]),'
        " round(num_users * self._probability))",
        tests=(f"{LOOP}::test_the_loop_samples_at_the_rate_that_the_event_charges_for",),
    ),
    Mutant(
        name="every_cohort_used_twice",
        breaks="P6: steps are not independent",
        file="udp_ray/dp/sampling.py",
        text='_Stream(self._key, "users", step)',
        replacement='_Stream(self._key, "users", step // 2)',
        tests=("tests/guarantee/test_sampling.py::test_user_sampling_is_poisson",),
    ),
    Mutant(
        name="examples_drawn_with_replacement",
        breaks="P21: an example counts twice within its user's mean",
        file="udp_ray/dp/sampling.py",
        text="chosen[:, column] = np.where(is_taken, last, drawn)",
        replacement="chosen[:, column] = drawn",
        tests=("tests/dp/test_sampling.py::test_a_cohort_is_well_formed",),
    ),
    Mutant(
        name="one_user_on_two_ranks",
        breaks="P20: every rank computes every user, who is clipped once on each",
        file="udp_ray/engine/language_model.py",
        text="rank=self.world.rank,",
        replacement="rank=0,",
        tests=(f"{LOOP}::test_two_ranks_share_the_groups_and_none_is_with_both",),
    ),
    Mutant(
        name="ranks_draw_other_cohorts",
        breaks="P12: each rank draws by a key of its own, so that users are missed or doubled",
        file="udp_ray/engine/language_model.py",
        text="cohorts(self.plan, self.keys.sampling, self.store))",
        replacement="cohorts(self.plan,"
        " type(self.keys.sampling)(bytes(15) + bytes([self.world.rank])), self.store))",
        tests=(f"{LOOP}::test_two_ranks_share_the_groups_and_none_is_with_both",),
    ),
]

PRICE = [
    Mutant(
        name="last_step_unpriced",
        breaks="review: a run of T steps is priced as one of T - 1",
        file="udp_ray/dp/plan.py",
        text="        return steps\n",
        replacement="        return max(0, steps - 1)\n",
        tests=(NOISE_AND_DIVISOR,),
    ),
    Mutant(
        name="user_priced_as_one_example",
        breaks="P40: the group size of els has no price",
        file="udp_ray/dp/plan.py",
        text="self.noise_multiplier, self.sampling_probability, self.group_size, steps",
        replacement="self.noise_multiplier, self.sampling_probability, 1, steps",
        tests=("tests/dp/test_plan.py::test_group_size_is_free_in_uls_and_costs_in_els",),
    ),
    Mutant(
        name="cap_priced_without_the_added_user",
        breaks="the price of a cap leaves out the user who is added",
        file="udp_ray/dp/plan.py",
        text="self._pool + (not self.population_is_declared),",
        replacement="self._pool,",
        tests=(
            "tests/dp/test_plan.py"
            "::test_a_counted_population_leaves_room_for_the_added_user_under_a_cap",
        ),
    ),
    Mutant(
        name="delta_above_one_over_population",
        breaks="P33: a delta that allows publishing a user outright",
        file="udp_ray/config/privacy.py",
        text="if delta >= 1 / population:",
        replacement="if delta >= 1:",
        tests=(
            "tests/dp/test_plan.py::test_a_plan_itself_refuses_a_delta_of_one_over_its_population",
        ),
    ),
    Mutant(
        name="tail_left_out_of_the_loss",
        breaks="review: what lies beyond the grid of losses is not charged",
        file="udp_ray/dp/accounting.py",
        text="mixture.upper_tail(highest) + mixture.lost,",
        replacement="0.0,",
        tests=("tests/dp/test_accounting.py::test_leaving_out_more_counts_is_more_pessimistic",),
    ),
    Mutant(
        name="tail_left_out_of_the_selection",
        breaks="review: infinite losses are not charged where the best of a sweep is released",
        file="udp_ray/dp/selection.py",
        text="np.asarray(infinite + np.maximum(",
        replacement="np.asarray(np.maximum(",
        tests=(
            "tests/guarantee/test_selection.py"
            "::test_what_lies_beyond_the_grid_of_losses_is_charged_in_a_profile",
        ),
    ),
    Mutant(
        name="losses_rounded_down",
        breaks="P37: an optimistic loss distribution",
        file="udp_ray/dp/accounting.py",
        text="up = np.clip(share + margin, 0.0, 1.0)",
        replacement="up = np.zeros_like(share)",
        tests=(
            "tests/guarantee/test_accounting_oracle.py"
            "::test_delta_of_a_step_is_never_below_the_exact_one_at_any_epsilon",
        ),
    ),
    Mutant(
        name="one_direction_of_the_loss",
        breaks="P35: only adding a user is charged for, not removing one",
        file="udp_ray/dp/selection.py",
        text="losses += [loss._pmf_remove.to_dense_pmf(), loss._pmf_add.to_dense_pmf()]",
        replacement="losses += [loss._pmf_add.to_dense_pmf()]",
        tests=("tests/guarantee/test_selection.py::test_a_profile_is_that_of_the_library",),
    ),
    Mutant(
        name="selection_not_charged",
        breaks="P32: the best of many runs at the price of one",
        file="udp_ray/dp/selection.py",
        text="SelectionCurve.of(profile, count).epsilon(delta)",
        replacement="accounting.epsilon(next(iter(events)), delta)",
        tests=(
            "tests/guarantee/test_selection.py"
            "::test_the_price_from_loss_distributions_covers_both_samplers",
        ),
    ),
    Mutant(
        name="number_of_trials_fixed",
        breaks="review: K is its mean, while a random K is priced",
        file="udp_ray/dp/selection.py",
        text="trials = max(count.smallest, int(np.argmax(count.survival() <= uniform)))",
        replacement="trials = max(count.smallest, round(count.mean))",
        tests=("tests/dp/test_selection.py::test_drawn_numbers_of_trials_follow_the_distribution",),
    ),
    Mutant(
        name="trials_share_one_key",
        breaks="P13: the trials of a secret sweep have the same noise",
        file="udp_ray/runs/sweep.py",
        text="key=_seeded_key(key, number) if is_seeded else RunKey.generate(),",
        replacement="key=_seeded_key(key, 1) if is_seeded else key,",
        tests=(
            "tests/on_ray/test_tune.py"
            "::test_a_sweep_is_charged_once_and_resumed_with_the_same_trials",
        ),
    ),
]

LEDGER = [
    Mutant(
        name="step_before_its_authorization",
        breaks="review, P26: noise is drawn for a step that may be refused, or forgotten",
        file="udp_ray/engine/loop.py",
        text="                try:\n"
        "                    budget_message = self._ask(self.step + 1)\n"
        "                except PreemptedError:\n"
        "                    return self._pause()\n"
        "                if budget_message is not None:\n"
        "                    break\n"
        "                self._take_step(source)\n",
        replacement="                self._take_step(source)\n"
        "                try:\n"
        "                    budget_message = self._ask(self.step)\n"
        "                except PreemptedError:\n"
        "                    return self._pause()\n"
        "                if budget_message is not None:\n"
        "                    break\n",
        tests=(
            f"{LOOP}::test_a_step_is_authorized_before_its_noise_is_drawn_and_no_other_is_asked_for",
        ),
    ),
    Mutant(
        name="noise_drawn_before_the_authorization",
        breaks="P26: noise of the next step is drawn ahead, and the ledger may refuse that step",
        file="udp_ray/engine/loop.py",
        text="                try:\n"
        "                    budget_message = self._ask(self.step + 1)\n",
        replacement="                if (noise := self.private_step._noise) is not None:\n"
        "                    for name, shape in self.engine.shapes.items():\n"
        "                        noise.tensor(self.step + 1, name, tuple(shape))\n"
        "                try:\n                    budget_message = self._ask(self.step + 1)\n",
        tests=(
            f"{LOOP}::test_a_step_is_authorized_before_its_noise_is_drawn_and_no_other_is_asked_for",
            f"{LOOP}::test_no_noise_is_drawn_for_a_step_that_was_refused",
        ),
    ),
    Mutant(
        name="metrics_before_the_commit",
        breaks="review: what is computed of weights that may be lost leaves all the same",
        file="udp_ray/engine/loop.py",
        text="        self.in_flight = InFlight(self.step, metrics)\n",
        replacement="        self._report(metrics)\n"
        "        self.in_flight = InFlight(self.step, metrics)\n",
        tests=(
            "tests/engine/test_loop.py"
            "::test_each_step_is_authorized_and_metrics_leave_after_their_commit",
        ),
    ),
    Mutant(
        name="private_number_in_the_metrics",
        breaks="P23: a number of the private batch leaves with the metrics",
        file="udp_ray/engine/loop.py",
        text="            self.on_metrics(metrics)",
        replacement="            self.on_metrics("
        'metrics | {"train/rejected": float(self.private_step._kernel.num_rejected)})',
        tests=("tests/engine/test_loop.py::test_metrics_are_public_numbers_and_nothing_else",),
    ),
    Mutant(
        name="evaluation_of_training_users",
        breaks="review, P52: an unpaid query on private users",
        file="udp_ray/engine/language_model.py",
        text="            self.store.heldout,\n",
        replacement="            self.store,\n",
        tests=(f"{LOOP}::test_evaluation_reads_the_heldout_users_and_no_others",),
    ),
    Mutant(
        name="evaluation_of_training_users_for_want_of_others",
        breaks="P52: without held-out users, training users are evaluated",
        file="udp_ray/engine/language_model.py",
        text="        if self.store.heldout is None:\n            return {}\n"
        '        self._enter("evaluating")\n'
        "        return evaluate(\n            self.model,\n            self.store.heldout,\n",
        replacement="        return evaluate(\n            self.model,\n"
        "            self.store.heldout or self.store,\n",
        tests=(f"{LOOP}::test_without_heldout_users_nothing_is_evaluated",),
    ),
    Mutant(
        name="rows_of_other_users",
        breaks="losses of rows are added up for other users than those whose rows they are",
        file="udp_ray/engine/evaluate.py",
        text="return cls(examples[order], users[order],",
        replacement="return cls(examples[order], users,",
        tests=("tests/engine/test_evaluate.py::test_losses_are_those_of_a_plain_loop",),
    ),
    Mutant(
        name="user_loss_weighted_by_tokens",
        breaks="the mean over users is one over tokens, which a few users decide",
        file="udp_ray/engine/evaluate.py",
        text="float(np.mean(loss_U / tokens_U))",
        replacement="float(loss_U.sum() / tokens)",
        tests=("tests/engine/test_evaluate.py::test_losses_are_those_of_a_plain_loop",),
    ),
    Mutant(
        name="every_rank_measures_all_rows",
        breaks="held-out rows are counted once for each rank",
        file="udp_ray/engine/evaluate.py",
        text="own = range(world.rank, rows.num_passes, world.size)",
        replacement="own = range(rows.num_passes)",
        tests=("tests/engine/test_evaluate.py::test_any_number_of_ranks_finds_exactly_the_same",),
    ),
    Mutant(
        name="trials_ranked_on_different_users",
        breaks="a sweep compares losses on different held-out users",
        file="udp_ray/runs/sweep.py",
        text='update={"evaluate_examples": self.heldout_examples}',
        replacement="update={}",
        tests=(
            "tests/runs/test_evaluated_users.py"
            "::test_the_trials_of_a_sweep_are_ranked_on_the_same_users",
        ),
    ),
    Mutant(
        name="one_step_more_than_admitted",
        breaks="review, P26: the ledger grants the step after the last",
        file="udp_ray/ledger/ledger.py",
        text="if run.charged_steps >= run.num_steps or step > run.num_steps:",
        replacement="if run.charged_steps > run.num_steps:",
        tests=(
            "tests/guarantee/test_budget.py::test_the_budget_stops_a_run_after_its_last_step[sqlite]",
        ),
    ),
    Mutant(
        name="steps_under_a_new_key_are_free",
        breaks="review: repeating steps under another key costs nothing",
        file="udp_ray/ledger/tables.py",
        text='{"charged_steps": run.charged_steps + 1,',
        replacement='{"charged_steps": run.charged_steps + (run.attempt == 1),',
        tests=(
            "tests/guarantee/test_budget.py"
            "::test_a_rekeyed_run_ends_earlier_by_the_steps_that_it_repeated[sqlite]",
        ),
    ),
    Mutant(
        name="replay_charged_again",
        breaks="the same release is charged twice, so that a run ends before its last step",
        file="udp_ray/ledger/ledger.py",
        text="            return False\n        differing =",
        replacement="            return False\n"
        "        rows.update_run(run.run_id, charged_steps=run.charged_steps + 1)\n"
        "        differing =",
        tests=(
            "tests/ledger/test_ledger.py"
            "::test_a_run_that_repeats_steps_still_gets_all_the_steps_it_has_paid_for[sqlite]",
        ),
    ),
    Mutant(
        name="replay_from_other_weights",
        breaks="the same noise on the sum of other weights is taken for the same release",
        file="udp_ray/ledger/ledger.py",
        text='["starting checkpoint"] * (reserved.start_digest != starting_checkpoint)',
        replacement="[]",
        tests=(
            "tests/ledger/test_ledger.py::test_a_step_from_another_starting_checkpoint_is_refused"
            "[sqlite]",
        ),
    ),
    Mutant(
        name="replay_with_other_data",
        breaks="the same noise on the sum of other users is taken for the same release",
        file="udp_ray/ledger/ledger.py",
        text='if differing and on_mismatch != "rekey":',
        replacement='if differing and on_mismatch == "never":',
        tests=(
            "tests/guarantee/test_budget.py::test_resuming_with_one_user_more_is_refused[sqlite]",
        ),
    ),
    Mutant(
        name="total_checked_run_by_run",
        breaks="P24: what other runs spent does not count",
        file="udp_ray/ledger/ledger.py",
        text="fits([*charges, charge], total)",
        replacement="fits([charge], total)",
        tests=(
            "tests/ledger/test_ledger.py::test_whole_budgets_add_up_until_a_run_does_not_fit[sqlite]",
        ),
    ),
    Mutant(
        name="delta_not_subtracted",
        breaks="only epsilon is kept within the total",
        file="udp_ray/ledger/records.py",
        text="    ) <= exact(total.delta)",
        replacement="    ) <= 1",
        tests=(
            "tests/ledger/test_ledger.py::test_whole_budgets_add_up_until_a_run_does_not_fit[sqlite]",
        ),
    ),
    Mutant(
        name="old_attempts_go_on",
        breaks="an attempt that was replaced still writes",
        file="udp_ray/ledger/ledger.py",
        text="if run.attempt != attempt.number:",
        replacement="if run.attempt < attempt.number:",
        tests=(
            "tests/ledger/test_ledger.py::test_an_attempt_that_was_replaced_may_no_longer_write[sqlite]",
        ),
    ),
    Mutant(
        name="key_for_an_old_attempt",
        breaks="P38: an attempt that was replaced still gets the key of the run",
        file="udp_ray/ledger/ledger.py",
        text="key = rows.key(self._run_of(rows, attempt, lock=False))",
        replacement="key = rows.key(rows.run(attempt.run_id))",
        tests=("tests/ledger/test_accountant.py::test_only_the_present_attempt_gets_the_key",),
    ),
    Mutant(
        name="failure_of_rank_0_ends_the_run",
        breaks="a rank that hears of rank 0's failure stops a run that could be restarted",
        file="udp_ray/errors.py",
        text="class RankFailedError(RuntimeError):",
        replacement="class RankFailedError(UdpRayError):",
        tests=(
            "tests/on_ray/test_worker.py"
            "::test_a_rank_that_hears_of_rank_0s_failure_leaves_the_run_to_be_restarted",
        ),
    ),
    Mutant(
        name="keys_survive_their_run",
        breaks="P38: with the ledger in hand the noise of an ended run can be subtracted",
        file="udp_ray/ledger/tables.py",
        text=".values(secret=secret))",
        replacement=".values(secret=KEYS.c.secret))",
        tests=(
            "tests/ledger/test_ledger.py::test_a_finished_run_has_no_key_and_cannot_continue[sqlite]",
        ),
    ),
    Mutant(
        name="ledger_not_flushed",
        breaks="review: a step that was reserved can be forgotten when the power fails",
        file="udp_ray/ledger/database.py",
        text='"synchronous=FULL"',
        replacement='"synchronous=OFF"',
        tests=(
            "tests/ledger/test_database.py"
            "::test_each_connection_flushes_to_the_disk_and_overwrites_what_it_deletes",
        ),
    ),
    Mutant(
        name="trials_priced_one_by_one",
        breaks="P32: all trials of a sweep may be seen, and one is charged",
        file="udp_ray/dp/sweep.py",
        text="[dp_event.SelfComposedDpEvent(event, count) for event, count in events.items()]",
        replacement="[event for event in events][:1]",
        tests=(
            "tests/dp/test_sweep.py"
            "::test_all_trials_of_full_batches_cost_one_gaussian_of_less_noise",
        ),
    ),
]

DATA = [
    Mutant(
        name="held_out_users_also_train",
        breaks="P22: users of a separate held-out input are in the training input too",
        file="udp_ray/data/build.py",
        text="    _refuse_overlap(train, heldout)\n",
        replacement="",
        tests=(
            "tests/data/test_finish.py"
            "::test_users_of_the_training_input_may_not_be_held_out_and_are_not_named",
        ),
    ),
    Mutant(
        name="share_of_users_not_held_out",
        breaks="P22: the users of the held-out share stay in the training split",
        file="udp_ray/data/tokenize.py",
        text="if is_heldout_input or is_in_share",
        replacement="if is_heldout_input",
        tests=(
            "tests/data/test_tokenize.py"
            "::test_heldout_users_go_to_the_heldout_shards_and_so_does_a_heldout_input",
        ),
    ),
    Mutant(
        name="one_user_in_two_shards",
        breaks="P20: a user is split over shards, and becomes two",
        file="udp_ray/data/tokenize.py",
        text="np.array(shards, np.int32)[rows]",
        replacement="np.array(shards, np.int32)[rows] ^ (np.arange(len(rows)) % 2)",
        tests=(
            "tests/data/test_tokenize.py"
            "::test_rows_become_examples_of_their_own_user_in_the_users_own_shard",
        ),
    ),
    Mutant(
        name="rows_of_a_shard_in_two_groups",
        breaks="P20: a user's examples are split over two tasks, of which one overwrites the other",
        file="udp_ray/data/build.py",
        text='1 + rows["shard"].to_numpy() % num_groups',
        replacement="1 + np.arange(len(rows)) % num_groups",
        tests=(
            "tests/data/test_finish.py"
            "::test_each_row_is_in_the_part_of_its_shards_group_and_counts_are_apart",
        ),
    ),
    Mutant(
        name="parts_of_a_block_share_its_memory",
        breaks="each of many parts is sent and stored with the whole block that it was cut from",
        file="udp_ray/data/build.py",
        text="rows.take(pa.array(order[first:end])) for",
        replacement="whole.slice(first, end - first) for whole in [rows.take(pa.array(order))] for",
        tests=(
            "tests/data/test_finish.py"
            "::test_each_row_is_in_the_part_of_its_shards_group_and_counts_are_apart",
        ),
    ),
    Mutant(
        name="blocks_forgotten_after_a_split",
        breaks="the first of the blocks that are split together are lost, and with them rows",
        file="udp_ray/data/build.py",
        text="    rows = pa.concat_tables(blocks)",
        replacement="    rows = pa.concat_tables(blocks[1:] or blocks)",
        tests=(
            "tests/data/test_packing.py::test_the_bytes_of_a_store_are_those_of_earlier_versions",
        ),
    ),
    Mutant(
        name="a_part_of_a_group_left_behind",
        breaks="the part of one split is not written, so that users lose examples in silence",
        file="udp_ray/data/build.py",
        text="write_shards(pa.concat_tables(parts), settings)",
        replacement="write_shards(pa.concat_tables(parts[-1:]), settings)",
        tests=(
            "tests/data/test_packing.py::test_the_bytes_of_a_store_are_those_of_earlier_versions",
        ),
    ),
    Mutant(
        name="tasks_write_on_after_a_refusal",
        breaks="a refused store comes back: a task that still runs makes its folder again",
        file="udp_ray/on_ray/prepare.py",
        text="            ray.cancel(task)\n        if running:\n",
        replacement="            del task\n        if not running:\n",
        tests=("tests/on_ray/test_prepare.py::test_no_task_writes_after_a_refusal",),
    ),
    Mutant(
        name="joined_pieces_with_a_gap",
        breaks="a task also reads the pieces of another task between its own, twice in the store",
        file="udp_ray/data/read.py",
        text="if last.last == piece.first and piece == follows:",
        replacement="if last is not piece and piece == follows:",
        tests=("tests/data/test_read.py::test_pieces_that_follow_one_another_are_read_as_one",),
    ),
    Mutant(
        name="rows_at_the_end_of_a_piece_read_twice",
        breaks="two tasks that share a row group of parquet both read the rows at their border",
        file="udp_ray/data/read.py",
        text="own.num_rows - max(position - last, 0)",
        replacement="own.num_rows",
        tests=("tests/data/test_read.py::test_pieces_of_parquet_hold_every_row_once_and_in_order",),
    ),
    Mutant(
        name="a_cut_response_loses_its_context",
        breaks="the rest of a response begins without the token that predicts its first",
        file="udp_ray/data/tokenize.py",
        text="taken - overlap, taken)",
        replacement="taken, taken)",
        tests=("tests/data/test_tokenize.py::test_rows_are_cut_together_as_each_is_alone",),
    ),
    Mutant(
        name="pieces_of_a_text_hashed_apart",
        breaks="a change of the hashes reorders the texts of users and changes existing digests",
        file="udp_ray/data/tokenize.py",
        text="np.flatnonzero(is_new | ~joined)",
        replacement="np.flatnonzero(np.ones_like(is_new))",
        tests=(
            "tests/data/test_packing.py::test_the_bytes_of_a_store_are_those_of_earlier_versions",
        ),
    ),
    Mutant(
        name="one_person_as_two_users",
        breaks="P41: a number read as an integer and as a float is two users",
        file="udp_ray/data/hashing.py",
        text="    return numbers.cast(pa.int64())",
        replacement="    return numbers.cast(pa.string())",
        tests=(
            "tests/data/test_hashing.py"
            "::test_a_large_number_is_the_same_user_whether_or_not_it_was_read_as_a_float",
        ),
    ),
    Mutant(
        name="examples_in_order_of_arrival",
        breaks="the order of rows decides which examples survive a bound",
        file="udp_ray/data/assemble.py",
        text="    order = _sorted_by(users, own)\n    if max_examples",
        replacement="    order = _sorted_by(users, np.zeros_like(own))\n    if max_examples",
        tests=("tests/data/test_assemble.py::test_arrival_order_cannot_be_seen_in_the_bytes",),
    ),
    Mutant(
        name="texts_joined_over_users",
        breaks="an example holds the text of two users, and is clipped as one of them",
        file="udp_ray/data/assemble.py",
        text="is_new_user | (pieces",
        replacement="(is_new_user & ~is_new_user) | (pieces",
        tests=(
            "tests/data/test_packing.py"
            "::test_failing_arm_texts_joined_over_users_are_caught_by_the_oracle",
        ),
    ),
    Mutant(
        name="texts_joined_in_order_of_arrival",
        breaks="the order of rows decides which texts share an example",
        file="udp_ray/data/assemble.py",
        text="    order = _sorted_by(users, ranks, own, numbers)",
        replacement="    order = _sorted_by(users, ranks)",
        tests=(
            "tests/data/test_packing.py"
            "::test_failing_arm_a_join_in_order_of_arrival_is_caught_by_the_shuffle",
        ),
    ),
    Mutant(
        name="prompts_within_an_example_carry_loss",
        breaks="the loss mask of a joined prompt is dropped",
        file="udp_ray/data/batches.py",
        text="        labels[~mask] = NO_LOSS\n",
        replacement="        pass\n",
        tests=(
            "tests/data/test_packing.py"
            "::test_a_reader_gives_labels_where_there_is_loss_and_nowhere_else",
        ),
    ),
    Mutant(
        name="held_out_texts_joined",
        breaks="held-out losses of packed and unpacked training are not comparable",
        file="udp_ray/data/build.py",
        text="if not self.pack or number >= self.placement.num_shards:",
        replacement="if not self.pack:",
        tests=("tests/data/test_packing.py::test_held_out_texts_are_stored_as_without_packing",),
    ),
    Mutant(
        name="equal_examples_have_one_hash",
        breaks="equal examples survive a bound together, so that one row can move many",
        file="udp_ray/data/hashing.py",
        text='struct.pack("<iq", loss_start, occurrence)',
        replacement='struct.pack("<iq", loss_start, 0)',
        tests=(
            "tests/data/test_assemble.py"
            "::test_equal_examples_survive_a_bound_one_by_one_not_together",
        ),
    ),
]

ROUNDING = [
    Mutant(
        name="sums_in_float32",
        breaks="P45: one user's absence changes how all others are rounded",
        file="udp_ray/dp/clipping.py",
        text="part.add_(block, alpha=factor)",
        replacement="part.copy_(part.float() + block * factor)",
        tests=(
            f"{ACCUMULATION}::test_the_order_of_16384_aligned_users_moves_their_sum_by_less_than"
            "_the_bound",
        ),
    ),
    Mutant(
        name="one_long_product",
        breaks="P45: float32 products over all groups of a microbatch",
        file="udp_ray/engine/kernels/gradients.py",
        text="accumulate(total, summed_outer(some_rows, some_columns))",
        replacement="total.copy_(total.float() + summed_outer(some_rows, some_columns))",
        tests=(
            f"{ACCUMULATION}::test_products_over_several_groups_stay_well_within_the_stated_slack",
        ),
    ),
    Mutant(
        name="materialized_gradients_added_in_float32",
        breaks="review: what a user adds is rounded by who shares its block, beyond the slack",
        file="udp_ray/engine/kernels/gradients.py",
        text="part.add_(factors_of_some @ some.double())",
        replacement="part.add_(factors_of_some.float() @ some)",
        tests=(
            f"{ACCUMULATION}"
            "::test_a_user_moves_a_crafted_sum_of_materialized_gradients_by_its_own_gradient_only",
        ),
    ),
    Mutant(
        name="microbatches_added_in_shared_tensors",
        breaks="review: a gradient that autograd gives to two parameters is added to twice",
        file="udp_ray/engine/kernels/direct.py",
        text="total = [gradient.clone() for gradient in total]",
        replacement="total = list(total)",
        tests=(
            "tests/engine/kernels/test_direct.py"
            "::test_parameters_that_share_a_gradient_have_sums_of_their_own",
        ),
    ),
    Mutant(
        name="nothing_kept_for_roundings",
        breaks="P45: groups are clipped to the whole clip norm, so roundings exceed it",
        file="udp_ray/engine/language_model.py",
        text="clip_norm=self.plan.clip_bound",
        replacement="clip_norm=self.plan.clip_norm",
        tests=(
            f"{LOOP}::test_groups_are_clipped_to_the_clip_norm_less_what_roundings_of_the_sum_need",
        ),
    ),
    Mutant(
        name="secure_noise_fused",
        breaks="P43: sums of other ranks are added to a value that was rounded already",
        file="udp_ray/config/experiment.py",
        text="    if is_secure:\n",
        replacement="    if is_secure and num_workers > 1000:\n",
        tests=(
            "tests/dp/test_secure_noise.py"
            "::test_secure_noise_with_fused_sums_is_refused_above_one_worker",
        ),
    ),
    Mutant(
        name="noise_rounded_before_it_is_added",
        breaks="P38: secure noise lies on the coarse grid of float32",
        file="udp_ray/engine/gradient_sum.py",
        text=".add_(values.to(flat.device))",
        replacement=".add_(values.to(flat.device).float())",
        tests=("tests/dp/test_secure_noise.py::test_secure_noise_does_not_show_it",),
    ),
    Mutant(
        name="replay_by_another_kernel",
        breaks="P46: the same noise on a sum that bfloat16 rounds otherwise",
        file="udp_ray/config/experiment.py",
        text='if self.model.autocast != "off" or self.model.dropout > 0 or is_adaptive:',
        replacement="if self.model.dropout > 1:",
        tests=(
            "tests/config/test_cli.py"
            "::test_where_kernels_round_visibly_the_digest_holds_what_decides_it",
        ),
    ),
    Mutant(
        name="dropout_masks_by_chance",
        breaks="P46: a repeated step has other masks under the same noise",
        file="udp_ray/engine/language_model.py",
        text="mask_seed=self.keys.dropout.number",
        replacement="mask_seed=None",
        tests=(
            f"{LOOP}::test_each_group_of_each_step_has_dropout_masks_of_its_own_that_a_repetition"
            "_shares",
        ),
    ),
    Mutant(
        name="dropout_seeds_not_used",
        breaks="P46: masks from the generator of the process, which a restart begins again",
        file="udp_ray/engine/kernels/direct.py",
        text="with _seeded(group.mask_seed, self._device):",
        replacement="with _seeded(None, self._device):",
        tests=(
            "tests/engine/kernels/test_direct.py::test_dropout_masks_are_those_of_the_groups_seed",
        ),
    ),
]

COUPLING = [
    Mutant(
        name="coupled_models_accepted",
        breaks="P42: a model in which users change each other's gradients is trained",
        file="udp_ray/engine/language_model.py",
        text="self.world.from_first(lambda: self._check_invariance(kernel))",
        replacement="self.world.from_first(lambda: None)",
        tests=(
            "tests/engine/test_invariance.py"
            "::test_training_refuses_before_it_asks_for_its_first_step",
        ),
    ),
    Mutant(
        name="company_not_checked",
        breaks="P36: layers that see the batch pass the check",
        file="udp_ray/engine/invariance.py",
        text="            self._check_shared(self._group(self._shared_tokens, seed=2))\n",
        replacement="            self._group(self._shared_tokens, seed=2)\n",
        tests=(
            "tests/engine/test_invariance.py"
            "::test_models_that_couple_users_are_refused_and_the_layer_is_named",
        ),
    ),
    Mutant(
        name="state_not_checked",
        breaks="P42: a buffer that grows with the longest text passes the check",
        file="udp_ray/engine/invariance.py",
        text="self._refuse_changed(self._state.changed(), group, verb)",
        replacement="self._state.changed()",
        tests=(
            "tests/engine/test_invariance.py::test_what_the_first_text_leaves_for_good_is_refused",
        ),
    ),
]

OWN_MODULE = [
    Mutant(
        name="own_module_not_clipped",
        breaks="P30: Trainer does not apply the plan's clip norm",
        file="udp_ray/engine/trainer.py",
        text="clip_norm=self.plan.clip_bound,",
        replacement="clip_norm=float('inf'),",
        tests=(f"{TRAINER}::test_removing_one_user_moves_the_sum_by_at_most_the_clip_norm",),
    ),
    Mutant(
        name="own_module_not_checked",
        breaks="P42: Trainer accepts a module that keeps what it has seen",
        file="udp_ray/engine/trainer.py",
        text="self.world.from_first(lambda: self._check_model(kernel))",
        replacement="self.world.from_first(lambda: None)",
        tests=(
            f"{TRAINER}::test_a_model_that_breaks_the_promise_is_refused_before_it_is_charged_a_step",
        ),
    ),
    Mutant(
        name="own_module_trained_on_all_ranks",
        breaks="P20: every rank of a Trainer computes every user",
        file="udp_ray/engine/trainer.py",
        text="np.flatnonzero(ranks == self.world.rank)",
        replacement="np.flatnonzero(ranks >= 0)",
        tests=(f"{TRAINER}::test_two_ranks_give_the_weights_of_one",),
    ),
    Mutant(
        name="own_module_with_one_key_for_all_runs",
        breaks="P13: two runs of a Trainer draw the same noise",
        file="udp_ray/engine/trainer.py",
        text="admitted = RunKey.generate() if key is None else key",
        replacement="admitted = RunKey.from_seed(0) if key is None else key",
        tests=(f"{TRAINER}::test_runs_have_keys_of_their_own",),
    ),
    Mutant(
        name="own_module_resumed_on_other_users",
        breaks="P46: the same noise on the sum of other users",
        file="udp_ray/engine/trainer.py",
        text="if saved.provenance.get(INPUTS) != self.provenance[INPUTS]:",
        replacement="if saved.provenance.get(INPUTS) is None:",
        tests=(f"{TRAINER}::test_a_run_does_not_continue_with_another_loss_or_other_users",),
    ),
    Mutant(
        name="own_module_charged_nothing",
        breaks="P26: a run in memory is not charged",
        file="udp_ray/engine/trainer.py",
        text="        self._charges.append(charge)\n",
        replacement="        charge = charge\n",
        tests=(f"{TRAINER}::test_a_run_whose_price_does_not_fit_is_refused_before_anything_moves",),
    ),
    Mutant(
        name="plain_engine_adds_up_ranks",
        breaks="P11: the noisy mean is multiplied by the number of ranks",
        file="udp_ray/engine/plain.py",
        text="                gradient /= num_ranks\n",
        replacement="                gradient /= 1\n",
        tests=(f"{TRAINER}::test_two_ranks_give_the_weights_of_one",),
    ),
]

OUTPUTS = [
    Mutant(
        name="commit_between_reserved_steps",
        breaks="review: a resumed run with more checkpoints can never end",
        file="udp_ray/engine/loop.py",
        text="return self.step >= replay_until and self._has_passed(",
        replacement="return self._has_passed(",
        tests=(
            "tests/engine/test_loop.py"
            "::test_a_run_resumed_with_more_checkpoints_commits_once_reserved_steps_are_repeated",
        ),
    ),
    Mutant(
        name="checkpoint_of_the_live_weights",
        breaks="a checkpoint that is written meanwhile holds the weights of later steps",
        file="udp_ray/engine/checkpoint.py",
        text="        return buffer.copy_(tensor.detach(), non_blocking=True)",
        replacement="        return tensor.detach()",
        tests=(
            "tests/engine/test_async_checkpoints.py"
            "::test_memory_is_used_again_and_later_changes_do_not_reach_it",
        ),
    ),
    Mutant(
        name="checkpoint_tensors_in_one_place",
        breaks="a checkpoint that is written tensor by tensor holds each one in another's place",
        file="udp_ray/engine/checkpoint.py",
        text="                stream.seek(start)\n",
        replacement="                stream.seek(self._mapped[file].numel() - tensor.nbytes)\n",
        tests=(
            "tests/engine/test_checkpoint.py"
            "::test_files_written_tensor_by_tensor_are_those_of_the_library",
        ),
    ),
    Mutant(
        name="checkpoint_lacks_a_tensor",
        breaks="a checkpoint that lacks a tensor is committed, with zeros in its place",
        file="udp_ray/engine/checkpoint.py",
        text="        if self._expected:\n",
        replacement="        if False:\n",
        tests=(
            "tests/engine/test_checkpoint.py"
            "::test_a_checkpoint_without_one_of_its_tensors_is_refused",
        ),
    ),
    Mutant(
        name="digest_of_weights_without_their_shapes",
        breaks="weights of another model have the digest of those that the ledger recorded",
        file="udp_ray/engine/checkpoint.py",
        text="    digest = hashlib.sha256(header)\n",
        replacement="    digest = hashlib.sha256()\n",
        tests=(
            "tests/engine/test_checkpoint.py"
            "::test_the_digest_of_weights_is_that_of_the_file_that_would_hold_them",
        ),
    ),
    Mutant(
        name="memory_without_buffers_for_gradients",
        breaks="the memory of a worker under ZeRO 3 is estimated too small by a fifth",
        file="udp_ray/engine/memory.py",
        text='        tensors += 1 + (train.offload != "none")\n',
        replacement="        tensors += 0\n",
        tests=("tests/engine/test_memory.py::test_slices_come_with_buffers_for_gradients",),
    ),
    Mutant(
        name="checkpoint_in_flight_not_committed_as_start",
        breaks="a run whose checkpoint was committed behind its last step cannot be resumed",
        file="udp_ray/ledger/tables.py",
        text="        self._connection.execute(changed.values(start_digest=start_digest))",
        replacement="        changed.values(start_digest=start_digest)",
        tests=(
            "tests/ledger/test_ledger.py::test_a_commit_behind_own_reservations_becomes_their_start",
        ),
    ),
    Mutant(
        name="commit_behind_another_attempts_step",
        breaks="steps of an earlier attempt are repeated from weights that it never had",
        file="udp_ray/ledger/ledger.py",
        text="rows.last_reserved(run, not_by=attempt.number)",
        replacement="0",
        tests=(
            "tests/ledger/test_ledger.py"
            "::test_a_commit_leaves_the_reservations_of_earlier_attempts_as_they_were",
        ),
    ),
    Mutant(
        name="step_authorized_before_a_diverged_evaluation_is_committed",
        breaks="P44: the number of steps of a run that diverged follows how long they took",
        file="udp_ray/engine/loop.py",
        text="if is_last or not is_finite or not self.settings.async_checkpoints:",
        replacement="if is_last or not self.settings.async_checkpoints:",
        tests=(
            "tests/engine/test_async_checkpoints.py"
            "::test_after_an_evaluation_that_is_not_finite_training_waits_for_the_commit",
        ),
    ),
    Mutant(
        name="failed_upload_stays",
        breaks="review: an upload that fails by a network error leaves a part of a checkpoint",
        file="udp_ray/on_ray/worker.py",
        text="            remove(Checkpoint(location))  # it is incomplete, and takes up room",
        replacement="            pass",
        tests=("tests/on_ray/test_uncommitted.py::test_an_upload_that_fails_leaves_nothing",),
    ),
    Mutant(
        name="evaluation_of_no_numbers_accepted",
        breaks="review: steps are charged before an evaluation without numbers is refused",
        file="udp_ray/engine/trainer.py",
        text="        _require_metrics(found)\n",
        replacement="",
        tests=(
            f"{TRAINER}"
            "::test_an_evaluation_that_returns_no_numbers_is_refused_before_anything_is_spent",
        ),
    ),
    Mutant(
        name="uncommitted_checkpoints_stay",
        breaks="review: two versions of a step lie in the storage after a crash",
        file="udp_ray/on_ray/worker.py",
        text="        remove_uncommitted(run_folder, attempt.committed, attempt=attempt.number)\n",
        replacement="        pass\n",
        tests=(
            "tests/on_ray/test_uncommitted.py"
            "::test_a_new_attempt_removes_uncommitted_checkpoints_once_older_attempts_are_fenced",
        ),
    ),
    Mutant(
        name="secret_sweep_refunded",
        breaks="P47: repeating a sweep until it draws a trial conditions the number of trials",
        file="udp_ray/ledger/ledger.py",
        text="if is_secret_sweep(tables.plan_of(run)):",
        replacement="if is_secret_sweep({}):",
        tests=(
            "tests/ledger/test_trials.py"
            "::test_a_secret_sweep_is_never_refunded_however_many_trials_it_drew",
        ),
    ),
    Mutant(
        name="copied_ledger_accepted",
        breaks="review: a copy of the ledger file is a second budget",
        file="udp_ray/runs/admission.py",
        text="    unknown = ledger.unknown_runs(recorded)\n",
        replacement="    unknown = ledger.unknown_runs(recorded)[:0]\n",
        tests=(
            "tests/on_ray/test_copied_ledger.py"
            "::test_of_two_copies_used_in_turn_the_second_is_refused_before_anything_is_charged",
        ),
    ),
]

GENERATION = [
    Mutant(
        name="noise_of_the_first_token_for_all",
        breaks="generation: every token of a text is drawn with the same random numbers",
        file="udp_ray/models/generate.py",
        text="counter=[0, 0, position, 0]",
        replacement="counter=[0, 0, 0, 0]",
        tests=(
            "tests/models/test_generate.py::test_the_second_token_has_its_conditional_distribution",
        ),
    ),
    Mutant(
        name="random_numbers_by_row",
        breaks="generation: a text depends on the texts beside it",
        file="udp_ray/models/generate.py",
        text="gumbel(self._seed, number, position, scores.shape[1]) for number in self._numbers",
        replacement="gumbel(self._seed, row, position, scores.shape[1])"
        " for row, _ in enumerate(self._numbers)",
        tests=(
            "tests/models/test_generate.py"
            "::test_a_text_depends_on_the_seed_and_its_number_and_not_on_its_company",
        ),
    ),
    Mutant(
        name="no_temperature",
        breaks="generation: the temperature has no effect",
        file="udp_ray/models/generate.py",
        text="processors.append(TemperatureLogitsWarper(sampling.temperature))",
        replacement="pass",
        tests=(
            "tests/models/test_generate.py::test_the_first_token_has_the_models_distribution[0.5]",
        ),
    ),
    Mutant(
        name="base_model_with_its_adapters",
        breaks="generation: the base model's texts are those of the fine-tuned model",
        file="udp_ray/models/generate.py",
        text="        self._trained.disable_adapters()\n",
        replacement="",
        tests=("tests/models/test_generate.py::test_adapters_write_what_the_merged_model_writes",),
    ),
    Mutant(
        name="void_statement_taken_for_a_guarantee",
        breaks="generation: texts of a seeded run are said to be covered",
        file="udp_ray/reports/generated.py",
        text="self.statement is not None and self.statement.is_guarantee",
        replacement="self.statement is not None",
        tests=("tests/reports/test_generated.py::test_a_void_statement_is_said_to_be_void",),
    ),
]

STUDY = [
    Mutant(
        name="study_without_seeds",
        breaks="all seeds of a study are one run, and its ranges over seeds are zero",
        file="udp_ray/experiments/study/settings.py",
        text='"privacy.seed": seed,',
        replacement='"privacy.seed": study.seeds[0],',
        tests=(
            "tests/experiments/test_study.py"
            "::test_each_cell_has_its_seed_and_equal_settings_have_one_digest",
        ),
    ),
    Mutant(
        name="study_compares_with_any_seed",
        breaks="a variant is compared with the baseline at other seeds",
        file="udp_ray/experiments/study/report.py",
        text='runs.merge(reference, on="seed", suffixes=("", "_baseline"))',
        replacement='runs.merge(reference, how="cross", suffixes=("", "_baseline"))',
        tests=("tests/experiments/test_study.py::test_differences_are_paired_by_seed",),
    ),
    Mutant(
        name="study_keeps_stale_cells",
        breaks="a cell measured under another default passes as one of the present default",
        file="udp_ray/experiments/study/folder.py",
        text="return record if all(",
        replacement="return record if any(",
        tests=(
            "tests/experiments/test_study.py"
            "::test_a_cell_is_measured_again_if_a_default_changed_and_not_for_a_new_setting",
        ),
    ),
    Mutant(
        name="study_cells_by_path",
        breaks="results of another model or text that stood at the same path pass as this one's",
        file="udp_ray/experiments/study/settings.py",
        text="given[section][name] = content_digest(place)",
        replacement="given[section][name] = place",
        tests=(
            "tests/experiments/test_study.py::test_text_and_model_count_by_content_and_not_by_path",
        ),
    ),
    Mutant(
        name="study_takes_users_with_few_rows",
        breaks="groups that a study calls full are not, and its comparison is of other users",
        file="udp_ray/experiments/study/run.py",
        text="if len(rows) >= least}",
        replacement="if len(rows) >= 1}",
        tests=("tests/experiments/test_study.py::test_users_with_few_rows_can_be_left_out",),
    ),
    Mutant(
        name="study_heldout_in_order_of_rows",
        breaks="variants whose held-out text is stored in another order are evaluated on others",
        file="udp_ray/experiments/study/run.py",
        text="for user in sorted(rows_of)[:most_users]:",
        replacement="for user in list(rows_of)[:most_users]:",
        tests=(
            "tests/experiments/test_study.py"
            "::test_held_out_users_are_whole_and_the_same_in_any_order_of_rows",
        ),
    ),
]

COVARIANCE = "tests/guarantee/test_correlated_noise.py"
SEALED = "tests/engine/test_sealed_noise.py"
CORRELATED = [
    Mutant(
        name="past_noise_not_subtracted",
        breaks="correlated noise is priced, and each step adds independent noise",
        file="udp_ray/dp/noise_history.py",
        text="                total[:size] -= past[:size]\n",
        replacement="                total[:size] -= 0.0\n",
        tests=(f"{COVARIANCE}::test_the_noise_of_all_steps_has_the_priced_covariance",),
    ),
    Mutant(
        name="past_noise_is_not_what_was_added",
        breaks="the kept noise is rounded further, so that errors pass on to later steps",
        file="udp_ray/dp/noise_history.py",
        text="[start:stop] = added",
        replacement="[start:stop] = added.bfloat16()",
        tests=(
            "tests/dp/test_noise_history.py"
            "::test_what_is_added_is_fresh_noise_off_by_one_rounding_however_long_the_run",
        ),
    ),
    Mutant(
        name="past_noise_lost_on_resume",
        breaks="a resumed run begins with no past noise, as if it had taken no step",
        file="udp_ray/engine/loop.py",
        text="            self._restore_noise(saved)\n",
        replacement="            if (history := self.private_step.history) is not None:\n"
        "                history.restart(saved.step + 1)\n",
        tests=(
            "tests/equivalence/test_correlated_noise.py"
            "::test_a_run_resumed_after_any_step_ends_with_the_same_bits",
        ),
    ),
    Mutant(
        name="rehearsed_noise_left_behind",
        breaks="the first step subtracts the noise of the start-up check",
        file="udp_ray/engine/noise_check.py",
        text="    step.end_rehearsal()\n",
        replacement="    if step.history is not None:\n        step.history.next_step = 1\n",
        tests=(
            "tests/equivalence/test_correlated_noise.py"
            "::test_the_loop_ends_with_the_weights_of_the_judge",
        ),
    ),
    Mutant(
        name="past_noise_in_clear",
        breaks="P51: past noise in a checkpoint, which can be subtracted from released weights",
        file="udp_ray/engine/sealed_noise.py",
        text="self._cipher.encrypt(self._nonce(), plain, self._line)",
        replacement="plain + self._nonce()[:0] + bytes(TAG_BYTES)",
        tests=(f"{SEALED}::test_nothing_of_the_noise_stands_in_the_file",),
    ),
    Mutant(
        name="past_noise_under_one_nonce",
        breaks="chunks are encrypted with the same stream, so that two of them give each other up",
        file="udp_ray/engine/sealed_noise.py",
        text="nonce = self._chunk.to_bytes",
        replacement="nonce = (0).to_bytes",
        tests=(f"{SEALED}::test_no_nonce_occurs_twice_in_a_file",),
    ),
    Mutant(
        name="new_key_for_correlated_noise",
        breaks="rounds of b steps begin again under a new key: one round more than was paid for",
        file="udp_ray/ledger/ledger.py",
        text="                _refuse_new_key(run_id, tables.plan_of(run), is_lost=kept is None)\n",
        replacement="",
        tests=("tests/ledger/test_ledger.py::test_a_run_with_correlated_noise_gets_no_new_key",),
    ),
]

BANDED = "tests/guarantee/test_banded.py"
BANDS = [
    Mutant(
        name="bands_left_out_of_the_loop",
        breaks="users are sampled in every step at the rate of their band",
        file="udp_ray/engine/loop.py",
        text="bands=plan.bands,",
        replacement="bands=1,",
        tests=(f"{BANDED}::test_no_user_takes_part_twice_within_b_steps",),
    ),
    Mutant(
        name="bands_move_from_round_to_round",
        breaks="a user takes part twice within b steps, whose columns of C share rows",
        file="udp_ray/dp/sampling.py",
        text="[users] == step % self._bands",
        replacement="[users] == (step + step // self._bands) % self._bands",
        tests=(f"{BANDED}::test_no_user_takes_part_twice_within_b_steps",),
    ),
    Mutant(
        name="a_round_begun_is_free",
        breaks="a run that ends early, or whose steps are no multiple of b, pays a round too few",
        file="udp_ray/dp/plan.py",
        text="return -(-num_steps // self.bands)",
        replacement="return num_steps // self.bands",
        tests=(f"{BANDED}::test_a_run_that_ends_early_has_paid_for_the_rounds_begun",),
    ),
    Mutant(
        name="sensitivity_of_one_row",
        breaks="the noise covers a step's own row of C x and not the b - 1 after it",
        file="udp_ray/dp/strategy.py",
        text="math.sqrt(math.fsum(c * c for c in strategy))",
        replacement="max(strategy)",
        tests=(f"{BANDED}::test_one_user_moves_the_mechanism_by_at_most_what_the_rounds_charge",),
    ),
    Mutant(
        name="bands_sampled_at_the_rate_of_all_users",
        breaks="steps have a b-th of the users that their sum is divided by",
        file="udp_ray/dp/plan.py",
        text="return self.bands * self.expected_size / self._pool",
        replacement="return self.expected_size / self._pool",
        tests=(f"{BANDED}::test_in_its_band_each_user_is_drawn_as_often_as_charged",),
    ),
]

EQUAL_AVERAGE = "tests/equivalence/test_average.py"
AVERAGE = [
    Mutant(
        name="trains_on_from_the_average",
        breaks="the weights that an evaluation of the average replaced are not put back",
        file="udp_ray/engine/average.py",
        text="            self._engine.set_weights(own.__getitem__)",
        replacement="            pass",
        tests=(f"{EQUAL_AVERAGE}::test_training_is_the_same_bit_for_bit_with_an_average[1-0]",),
    ),
    Mutant(
        name="average_forgotten_at_restart",
        breaks="a resumed run averages from the restart on",
        file="udp_ray/engine/loop.py",
        text="                self.average.load(saved.average)",
        replacement="                pass",
        tests=(f"{EQUAL_AVERAGE}::test_a_resumed_run_ends_with_the_same_bits[ema]",),
    ),
    Mutant(
        name="tail_from_the_first_step",
        breaks="the mean over the last steps counts all steps",
        file="udp_ray/engine/average.py",
        text="    return 1 / max(1, step - (num_steps - num_averaged))",
        replacement="    return 1 / step",
        tests=("tests/engine/test_average.py::test_tail_weighs_the_last_steps_alike",),
    ),
    Mutant(
        name="digest_without_the_average",
        breaks="the ledger's digest of a checkpoint does not cover its average",
        file="udp_ray/engine/checkpoint.py",
        text='        "files": digests,',
        replacement='        "files": {name: digests[name] for name in sorted(ALWAYS)},',
        tests=("tests/engine/test_average.py::test_the_digest_covers_the_average",),
    ),
    Mutant(
        name="sweep_ranks_other_weights",
        breaks="a sweep chooses by the last weights and publishes their average",
        file="udp_ray/on_ray/publish.py",
        text="    return prefix + config.sweep.objective",
        replacement="    return config.sweep.objective",
        tests=(
            "tests/on_ray/test_tune.py::test_trials_are_ranked_by_the_weights_that_are_published",
        ),
    ),
]

BLACK_BOX_TESTS = "tests/experiments/test_black_box.py"
BLACK_BOX = [
    Mutant(
        name="black_box_coin_is_unfair",
        breaks="three of four canaries are in, so that guesses are right by chance more often",
        file="udp_ray/experiments/audit/canary_texts.py",
        text="digest.digest()[0] & 1)",
        replacement="digest.digest()[0] & 3)",
        tests=(
            f"{BLACK_BOX_TESTS}::test_coins_are_fair_and_independent_of_ids_places_and_other_keys",
        ),
    ),
    Mutant(
        name="black_box_trains_on_all_canaries",
        breaks="canaries whose coin says out are in the store all the same",
        file="udp_ray/experiments/audit/canary_texts.py",
        text="if is_in or not only_in",
        replacement="if True",
        tests=(f"{BLACK_BOX_TESTS}::test_only_canaries_that_are_in_get_rows",),
    ),
    Mutant(
        name="black_box_scores_of_other_canaries",
        breaks="scores are in the order of the store, not in that of the coins",
        file="udp_ray/experiments/audit/canary_scores.py",
        text="losses[self.numbers] = means",
        replacement="losses[:] = means",
        tests=(f"{BLACK_BOX_TESTS}::test_losses_are_those_of_a_plain_loop",),
    ),
    Mutant(
        name="held_out_share_takes_canaries",
        breaks="canaries whose coin says in are held out, so that the audit has less power",
        file="udp_ray/data/tokenize.py",
        text="user_hash not in self.never_held_out and is_held_out(",
        replacement="is_held_out(",
        tests=(f"{BLACK_BOX_TESTS}::test_a_share_of_held_out_users_takes_no_canary",),
    ),
    Mutant(
        name="audit_decides_by_the_gaussian_bound",
        breaks="a promise counts as refuted by a bound that holds for Gaussian mechanisms only",
        file="udp_ray/reports/audit.py",
        text="return self.bound > self.promised_epsilon",
        replacement="return self.gaussian_bound > self.promised_epsilon",
        tests=("tests/reports/test_audit.py::test_the_gaussian_bound_decides_nothing",),
    ),
]

STARTUP = [
    Mutant(
        name="damaged_price_believed",
        breaks="a price that an editor or a crash has changed on disk is read as computed",
        file="udp_ray/runs/remembered.py",
        text="                if check == _check(self._file, name, value):\n",
        replacement="                if check is not None:\n",
        tests=(
            "tests/runs/test_remembered.py::test_a_damaged_line_is_not_believed_and_the_others_are",
        ),
    ),
    Mutant(
        name="price_remembered_without_delta",
        breaks="an epsilon at one delta is taken for that at another",
        file="udp_ray/dp/accounting.py",
        text='    key = f"epsilon of {event!r} at {delta!r} by {precision!r}"\n',
        replacement='    key = f"epsilon of {event!r} by {precision!r}"\n',
        tests=(
            "tests/runs/test_remembered.py"
            "::test_an_epsilon_is_found_only_for_the_same_event_delta_and_precision",
        ),
    ),
    Mutant(
        name="promise_remembered",
        breaks="a plan states an epsilon from a file instead of computing it",
        file="udp_ray/dp/plan.py",
        text="    with accounting.computing():  # a promise never comes from a file\n",
        replacement="    if True:\n",
        tests=(
            "tests/runs/test_remembered.py"
            "::test_a_plan_computes_its_epsilon_whatever_is_remembered",
        ),
    ),
    Mutant(
        name="found_noise_believed",
        breaks="review: a dry run prints noise that damaged prices gave",
        file="udp_ray/runs/dry_run.py",
        text="            if is_confirmed(found):\n",
        replacement="            if found:\n",
        tests=(
            "tests/runs/test_remembered.py"
            "::test_a_search_that_is_not_confirmed_is_repeated_without_the_memory",
        ),
    ),
    Mutant(
        name="run_priced_from_memory",
        breaks="review: a run gets the noise that its caller remembers",
        file="udp_ray/runs/admission.py",
        text="    with computing():  # nothing is spent",
        replacement="    if True:  # nothing is spent",
        tests=(
            "tests/runs/test_remembered.py"
            "::test_what_a_caller_remembers_reaches_no_run_and_no_sweep",
        ),
    ),
    Mutant(
        name="model_unchecked",
        breaks="a run is charged for a store that another tokenizer made",
        file="udp_ray/runs/admission.py",
        text="    check_model(config, store.manifest)\n    return Run(\n",
        replacement="    return Run(\n",
        tests=(
            "tests/runs/test_remembered.py"
            "::test_a_run_asks_no_memory_and_checks_the_model_before_anything_is_spent",
        ),
    ),
]

AUDITING_TESTS = "tests/dp/test_auditing.py"
CANARIES = "tests/guarantee/test_canaries.py"
AUDITING = [
    Mutant(
        name="audit_without_the_factor_2",
        breaks="the one-run p-value charges m delta, not 2 m delta",
        file="udp_ray/dp/auditing.py",
        text="share = 2 * guesses.num_canaries * delta / i",
        replacement="share = guesses.num_canaries * delta / i",
        tests=(f"{AUDITING_TESTS}::test_bounds_are_those_of_jax_privacy",),
    ),
    Mutant(
        name="audit_counts_one_right_guess_too_many",
        breaks="the one-run p-value is P[W > v], not P[W >= v]",
        file="udp_ray/dp/auditing.py",
        text="stats.binom.sf(at_least - 1, trials, chance)",
        replacement="stats.binom.sf(at_least, trials, chance)",
        tests=(f"{AUDITING_TESTS}::test_no_private_mechanism_beats_the_p_value",),
    ),
    Mutant(
        name="audit_guesses_at_one_end",
        breaks="the auditor never guesses that a canary is out",
        file="udp_ray/dp/auditing.py",
        text="num_low = num_guesses // 2",
        replacement="num_low = 0",
        tests=(f"{AUDITING_TESTS}::test_the_highest_are_guessed_in_and_the_lowest_out",),
    ),
    Mutant(
        name="audit_believes_scores_that_are_not_finite",
        breaks="a NaN score is sorted to the top and guessed to be in",
        file="udp_ray/dp/auditing.py",
        text="if not np.isfinite(values).all():",
        replacement="if False:",
        tests=(f"{AUDITING_TESTS}::test_a_score_that_is_not_finite_is_refused",),
    ),
    Mutant(
        name="canaries_of_norm_1",
        breaks="a canary's gradient has the norm 1 in place of the clip norm",
        file="udp_ray/engine/canaries.py",
        text="total *= clip_bound * self.scale",
        replacement="total *= self.scale",
        tests=(f"{CANARIES}::test_directions_have_the_clip_norm_and_are_nearly_orthogonal",),
    ),
    Mutant(
        name="canaries_all_in",
        breaks="no canary is out, so that nothing can be guessed",
        file="udp_ray/engine/canaries.py",
        text="coins.number(canary) % 2 == 1",
        replacement="coins.number(canary) >= 0",
        tests=(f"{CANARIES}::test_coins_are_fair_and_of_the_seed",),
    ),
    Mutant(
        name="canary_slice_begins_at_a_byte",
        breaks="a slice of a direction that is drawn alone is another one",
        file="udp_ray/engine/canaries.py",
        text="offset = start - 8 * begin",
        replacement="offset = 0",
        tests=(f"{CANARIES}::test_any_slice_of_a_direction_can_be_drawn_alone",),
    ),
    Mutant(
        name="canaries_on_every_rank",
        breaks="each rank adds all canaries, so that they enter as often as there are ranks",
        file="udp_ray/engine/canaries.py",
        text="numbers[np.arange(len(numbers)) % self._world.size != self._world.rank] = 0",
        replacement="numbers[:] = numbers",
        tests=(f"{CANARIES}::test_runs_with_canaries_do_not_depend_on_ranks_stage_or_kernel",),
    ),
    Mutant(
        name="audit_forgets_the_steps_of_a_checkpoint",
        breaks="a resumed audit scores only the steps after the restart",
        file="udp_ray/engine/canaries.py",
        text="self._observed = list(saved[OBSERVED].numpy())",
        replacement="self._observed = []",
        tests=(f"{CANARIES}::test_a_killed_and_resumed_audit_ends_alike",),
    ),
    Mutant(
        name="audit_of_other_canaries_resumes",
        breaks="an audit is continued with other canaries than it began with",
        file="udp_ray/config/audit.py",
        text='exclude={"confidence", "guesses", "accept_canaries"},',
        replacement='exclude={"confidence", "guesses", "accept_canaries", "seed"},',
        tests=(
            "tests/config/test_audit.py::test_canaries_are_part_of_the_digest_and_statistics_are_not",
        ),
    ),
    Mutant(
        name="audited_model_without_a_mark",
        breaks="the statement of an audited run does not say that its model is not for release",
        file="udp_ray/reports/statement.py",
        text="        if self.is_accepted:\n            return None",
        replacement="        if not self.is_accepted:\n            return None",
        tests=(
            "tests/reports/test_statement.py::"
            "test_an_audited_run_says_so_and_is_not_for_release_unless_accepted",
        ),
    ),
    Mutant(
        name="audit_at_the_wrong_confidence",
        breaks="the bound of the plan's mechanism rejects at 95% in place of 5%",
        file="udp_ray/dp/auditing.py",
        text="return not recursion.is_possible(_level(confidence))",
        replacement="return not recursion.is_possible(1 - _level(confidence))",
        tests=(
            "tests/experiments/test_audit.py::"
            "test_plan_bound_agrees_with_a_rejection_at_each_noise",
        ),
    ),
]

SCALING = [
    Mutant(
        name="scales_follow_the_step_itself",
        breaks="gradients are scaled by second moments of the private gradients of the same step",
        file="udp_ray/experiments/study/scaling.py",
        text="        gradient = super().group_gradient(group)\n",
        replacement="        gradient = super().group_gradient(group)\n"
        "        own = zip(self._scales.values, gradient, strict=True)\n"
        "        self._scales.follow({name: part.square() for name, part in own}, 0.1)\n",
        tests=(
            "tests/experiments/test_scaling.py::test_scales_of_a_step_are_the_same_whoever_is_in_it",
        ),
    ),
    Mutant(
        name="scaled_mean_is_not_unscaled",
        breaks="AdamW is given the scaled mean as if it were the gradient",
        file="udp_ray/experiments/study/scaling.py",
        text="{name: mean / scales[name] for name, mean in gradients.items()}",
        replacement="{name: mean for name, mean in gradients.items()}",
        tests=(
            "tests/experiments/test_scaling.py::test_without_clipping_and_noise_scaling_changes_nothing",
        ),
    ),
    Mutant(
        name="scaled_cell_trains_unscaled",
        breaks="a variant with a scaling is trained without it",
        file="udp_ray/experiments/study/run.py",
        text='"scaling": cell.scaling,',
        replacement='"scaling": None,',
        tests=("tests/experiments/test_study.py::test_a_scaled_variant_is_trained_scaled",),
    ),
]

BREAKS = "tests/faults/test_ledger_breaks.py"

STOPS_AND_BREAKS = [
    Mutant(
        name="sigterm_ends_a_job_at_once",
        breaks="a driver that Ray stops leaves without a word, and cleans nothing up",
        file="udp_ray/config/cli.py",
        text="before = signal.signal(signal.SIGTERM, interrupt)",
        replacement="before = signal.getsignal(signal.SIGTERM)",
        tests=("tests/config/test_cli.py::test_sigterm_lets_a_job_clean_up_and_exits_with_143",),
    ),
    Mutant(
        name="unanswered_reservation_taken_for_granted",
        breaks="noise is drawn for a step whose transaction the server has rolled back",
        file="udp_ray/on_ray/accountant.py",
        text="                    if time.monotonic() + pause > deadline:\n"
        "                        raise\n",
        replacement="                    return None  # type: ignore[return-value]\n",
        tests=(
            f"{BREAKS}"
            "::test_a_step_is_charged_once_when_the_connection_breaks_while_it_is_reserved",
        ),
    ),
    Mutant(
        name="dead_connection_waited_for",
        breaks="a run whose database has gone without a sign waits for up to two hours",
        file="udp_ray/ledger/database.py",
        text="connect_args=options,",
        replacement="connect_args={},",
        tests=(f"{BREAKS}::test_a_connection_is_found_dead_within_half_a_minute",),
    ),
]

PREEMPTION = [
    Mutant(
        name="pause_between_reserved_steps",
        breaks="a notice pauses a run where no checkpoint may be committed, and its steps are lost",
        file="udp_ray/on_ray/accountant.py",
        text="if self._progress.is_preempted and step > attempt.replay_until:",
        replacement="if self._progress.is_preempted:",
        tests=(
            "tests/on_ray/test_accountant.py"
            "::test_a_notice_waits_until_reserved_steps_are_repeated",
        ),
    ),
    Mutant(
        name="notice_of_an_old_attempt",
        breaks="a worker that is gone pauses the workers that took its place",
        file="udp_ray/on_ray/accountant.py",
        text="        if self._attempt is not None and self._attempt.number == number:\n"
        "            self._update(is_preempted=True)",
        replacement="        self._update(is_preempted=True)",
        tests=(
            "tests/on_ray/test_accountant.py::test_a_notice_of_an_older_attempt_changes_nothing",
        ),
    ),
    Mutant(
        name="pause_without_a_checkpoint",
        breaks="the steps before a notice are lost with the worker that is taken away",
        file="udp_ray/engine/loop.py",
        text="        if self.step > self.saved:\n            self._checkpoint(is_last=False)\n",
        replacement="",
        tests=(
            "tests/engine/test_preemption.py::test_a_notice_leads_to_a_checkpoint_of_the_last_step"
            "_and_the_run_continues_to_the_same_bits[blocking]",
        ),
    ),
    Mutant(
        name="run_ends_at_a_notice",
        breaks="a run that paused for a notice is published, and ended, before its last step",
        file="udp_ray/on_ray/train.py",
        text="        return is_told and not progress.has_ended\n",
        replacement="        return is_told and progress.has_ended\n",
        tests=(
            "tests/on_ray/test_preemption.py"
            "::test_workers_are_started_again_after_a_notice_and_only_then",
        ),
    ),
    Mutant(
        name="drain_that_does_not_wait",
        breaks="a machine is taken away while its worker is within a step",
        file="udp_ray/on_ray/drain.py",
        text="        while is_in_use(node_id):\n",
        replacement="        while False:\n",
        tests=(
            "tests/on_ray/test_drain.py"
            "::test_the_call_waits_for_a_worker_and_nothing_new_is_placed",
        ),
    ),
    Mutant(
        name="drain_notice_for_idle_nodes",
        breaks="Ray refuses to drain a node that is in use, and training is not told",
        file="udp_ray/on_ray/drain.py",
        text='"DRAIN_NODE_REASON_PREEMPTION"',
        replacement='"DRAIN_NODE_REASON_IDLE_TERMINATION"',
        tests=("tests/on_ray/test_drain.py::test_a_node_that_stays_in_use_is_reported",),
    ),
    Mutant(
        name="drain_of_the_head",
        breaks="the node that holds the drivers of runs is drained, and they end",
        file="udp_ray/on_ray/drain.py",
        text='    if HEAD in nodes[node_id]["Resources"]:\n',
        replacement="    if HEAD in nodes:\n",
        tests=("tests/on_ray/test_drain.py::test_the_head_and_unknown_nodes_are_refused",),
    ),
    Mutant(
        name="fused_sums_of_the_least_workers",
        breaks="a range from one worker lets rank 0 round its noise before other workers' sums",
        file="udp_ray/config/experiment.py",
        text="num_workers=cluster.most_workers,",
        replacement="num_workers=cluster.least_workers,",
        tests=(
            "tests/config/test_cli.py::test_a_range_that_reaches_two_workers_counts_as_several",
        ),
    ),
]

SCALE = [
    Mutant(
        name="kept_example_of_the_user_before",
        breaks="an example of els is read as one of the user before, who may have kept others",
        file="udp_ray/dp/sampling.py",
        text='np.searchsorted(self._offsets, kept, side="right") - 1',
        replacement='np.maximum(np.searchsorted(self._offsets, kept, side="left") - 1, 0)',
        tests=("tests/dp/test_sampling.py::test_kept_examples_are_read_as_if_they_were_all_there",),
    ),
    Mutant(
        name="blocks_of_users_share_their_bits",
        breaks="users of different blocks draw the same subsets: they are not independent",
        file="udp_ray/dp/sampling.py",
        text="_floyd(words[block], sizes[rows[block]]",
        replacement="_floyd(words[: len(rows[block])], sizes[rows[block]]",
        tests=("tests/dp/test_sampling.py::test_cohorts_are_those_of_earlier_versions",),
    ),
    Mutant(
        name="lengths_of_another_example",
        breaks="lengths of examples in many shards come in the order of the shards",
        file="udp_ray/data/store.py",
        text="np.split(order, firsts[1:])",
        replacement="np.split(np.arange(len(order)), firsts[1:])",
        tests=("tests/data/test_store.py::test_lengths_over_many_shards_are_those_of_the_tokens",),
    ),
    Mutant(
        name="slope_through_other_texts_per_user",
        breaks="the growth is taken through a size with another number of texts per user",
        file="udp_ray/experiments/scale/report.py",
        text='[row for row in self.sizes if row["is_in_growth"]]',
        replacement="list(self.sizes)",
        tests=(
            "tests/experiments/test_scale.py"
            "::test_the_report_has_every_size_its_slopes_and_the_figure",
        ),
    ),
]

COMPARED = [
    Mutant(
        name="samplers_compared_across_seeds",
        breaks="the losses of ELS and ULS are compared in opposite orders of the seeds",
        file="udp_ray/experiments/study/fixed_compute.py",
        text="[theirs[seed] - ours[seed] for seed in sorted(ours.keys() & theirs.keys())]",
        replacement="[theirs[b] - ours[a] for a, b in zip(sorted(ours), sorted(theirs)[::-1])]",
        tests=(
            "tests/experiments/test_fixed_compute.py"
            "::test_the_best_of_each_sampler_are_compared_seed_by_seed",
        ),
    ),
    Mutant(
        name="runs_without_noise_count_as_methods",
        breaks="non-private fine-tuning competes with ULS and ELS",
        file="udp_ray/experiments/study/fixed_compute.py",
        text="    private, free = frame[is_private], frame[~is_private]\n",
        replacement="    highest = frame.epsilon[is_private].max()\n"
        "    private = frame.assign(epsilon=frame.epsilon.clip(upper=highest))\n"
        "    free = frame[~is_private]\n",
        tests=(
            "tests/experiments/test_fixed_compute.py"
            "::test_runs_without_noise_are_the_end_of_the_scale_and_no_method",
        ),
    ),
    Mutant(
        name="group_privacy_keeps_delta",
        breaks="the promise to an author is converted to one to a record with the author's delta",
        file="udp_ray/experiments/study/opacus.py",
        text="delta / sum(math.exp(number * each) for number in range(group_size))",
        replacement="delta / group_size",
        tests=(
            "tests/experiments/test_opacus.py"
            "::test_the_target_of_a_record_is_that_of_an_author_by_group_privacy",
        ),
    ),
]

MUTANTS = [
    *CLIPPING, *NOISE, *SAMPLING, *PRICE, *LEDGER, *DATA, *ROUNDING, *COUPLING, *OWN_MODULE,
    *OUTPUTS, *GENERATION, *STUDY, *CORRELATED, *BANDS, *AVERAGE, *STARTUP, *AUDITING, *SCALING,
    *BLACK_BOX, *STOPS_AND_BREAKS, *PREEMPTION, *SCALE, *COMPARED,
]  # fmt: skip
