"""The pin of the CUDA seam: what it relies on in vLLM's V2 runner, checked without a GPU."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from ouro_runtime.engine.pin import SeamError, check_parameters

INPUT_BATCH = """
    req_ids num_reqs num_reqs_after_padding idx_mapping idx_mapping_np expanded_idx_mapping
    expanded_local_pos num_scheduled_tokens num_tokens num_tokens_after_padding query_start_loc
    query_start_loc_np seq_lens seq_lens_cpu_upper_bound num_computed_prefill_tokens_np
    prefill_len_np is_prefilling_np input_ids positions logits_indices cu_num_logits
    cu_num_logits_np
""".split()
"""Fields of `InputBatch` that are read or replaced."""


DRAWS = ("thinking_budget_state", "apply_temperature", "apply_min_p", "apply_top_k_top_p")
"""What vLLM's sampler does to logits after its processors: `is_plain` asks for each."""


def check() -> None:
    """Raise SeamError for the first thing that is not as the seam was written for.

    Raises:
        SeamError: if vLLM moved. RuntimeError: if vLLM's GPU modules cannot be imported here.
    """
    try:
        from vllm.v1.core.sched.output import NewRequestData
        from vllm.v1.outputs import LogprobsTensors
        from vllm.v1.worker.gpu import async_utils, attn_utils, model_runner
        from vllm.v1.worker.gpu.block_table import BlockTables
        from vllm.v1.worker.gpu.input_batch import InputBatch
        from vllm.v1.worker.gpu.model_states.interface import ModelState
        from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
        from vllm.v1.worker.gpu.sample.output import SamplerOutput
        from vllm.v1.worker.gpu.sample.sampler import Sampler
        from vllm.v1.worker.gpu_worker import Worker
    except ImportError as error:
        raise RuntimeError(f"the CUDA engine needs vLLM's GPU modules: {error}") from error
    runner = model_runner.GPUModelRunner
    check_parameters(ModelState.__init__, "vllm_config", "model", "encoder_cache", "device")
    check_parameters(ModelState.add_request, "req_index", "new_req_data")
    check_parameters(ModelState.prepare_inputs, "input_batch", "req_states")
    check_parameters(ModelState.prepare_attn, "slot_mappings", "for_capture", "ubatch_idx")
    check_parameters(ModelState.initialize_kv_cache, "kv_cache_config", "block_tables")
    check_parameters(ModelState.capture_inner_cudagraphs, "block_tables", "attn_groups")
    check_parameters(ModelState.custom_sampler, "sampler")
    check_parameters(
        attn_utils.build_attn_metadata,
        *"""
        attn_groups num_reqs num_tokens query_start_loc_gpu query_start_loc_cpu max_query_len
        seq_lens max_seq_len block_tables slot_mappings kv_cache_config seq_lens_cpu_upper_bound
        positions is_prefilling for_cudagraph_capture req_idx""".split(),
    )
    check_parameters(attn_utils.build_slot_mappings_by_layer, "slot_mappings", "kv_cache_config")
    check_parameters(Sampler.__call__, "logits", "input_batch")
    check_parameters(Sampler.get_logprobs_dims, "idx_mapping_np")
    # `sample_plain` draws as the sampler does for requests that ask for nothing else.
    check_parameters(
        gumbel_sample,
        *"logits expanded_idx_mapping temperature seed pos apply_temperature use_fp64".split(),
    )
    mentions(Sampler.apply_sampling_params, "needs_logits_processing", ".logits_processors", *DRAWS)
    mentions(Sampler._sample_random, "apply_top_k_top_p(", "gumbel_sample(")
    check_parameters(Worker._make_model_runner, "self")
    check_parameters(runner.execute_model, "scheduler_output")
    check_parameters(runner.sample_tokens, "grammar_output")
    check_parameters(runner.finish_requests, "scheduler_output")
    check_parameters(async_utils.stream, "to_stream", "from_stream")
    fields(InputBatch, *INPUT_BATCH)
    fields(NewRequestData, "req_id", "sampling_params", "prefill_token_ids")
    fields(
        SamplerOutput,
        *"""
        sampled_token_ids logprobs_tensors num_nans num_sampled num_rejected""".split(),
    )
    order = list(LogprobsTensors._fields[:4])
    if order != [
        "logprob_token_ids",
        "logprobs",
        "selected_token_ranks",
        "cu_num_generated_tokens",
    ]:
        raise SeamError(f"LogprobsTensors has other fields: {order}")
    # In this order: `forward` gets what `prepare_inputs` returns; the sampler's output is copied
    # to the host before requests move by `query_len - num_rejected`.
    mentions(
        runner.execute_model,
        "self.model_state.prepare_attn(",
        "**self.model_state.prepare_inputs(",
        "self.model(**model_inputs)",
    )
    mentions(
        runner.sample,
        "self.model.compute_logits(",
        ".apply_grammar_bitmask(",
        "self.sampler(logits, input_batch)",
    )
    mentions(runner.sample_tokens, "AsyncOutput(", "self.postprocess_sampled(")
    check_parameters(runner.capture_model, "profile_only")
    mentions(runner.capture_model, "capture_inner_cudagraphs")
    mentions(
        runner.initialize_kv_cache,
        "get_additional_cg_support",
        "self.model_state.initialize_kv_cache(",
    )
    mentions(model_runner.GPUModelRunner.load_model, "custom_sampler")
    # Block tables that moved are gathered where they are now.
    mentions(BlockTables.init_block_table_layout_tensors, "input_block_table_ptrs")
    gathers = ("self.input_block_tables", "self.input_block_table_ptrs")
    mentions(BlockTables.gather_block_tables, *gathers)
    mentions(BlockTables.get_dummy_block_tables, "self.input_block_tables")
    mentions(runner.prepare_attn, ".gather_block_tables(", ".compute_slot_mappings(")
    mentions(Sampler.__init__, "logit_bias_state,", "self.penalties_state,", "bad_words_state,")


def fields(kind: Any, *names: str) -> None:
    """Raise SeamError unless the dataclass has these fields."""
    known = {field.name for field in dataclasses.fields(kind)}
    missing = [name for name in names if name not in known]
    if missing:
        raise SeamError(f"{kind.__name__} no longer has {', '.join(missing)}")


def mentions(function: Callable, *names: str) -> None:
    """Raise SeamError unless the function's source names these, the first mentions in order."""
    source = inspect.getsource(inspect.unwrap(function))
    places = [source.find(name) for name in names]
    if -1 in places or places != sorted(places):
        raise SeamError(f"{function.__qualname__} no longer uses {', '.join(names)} in this order")
