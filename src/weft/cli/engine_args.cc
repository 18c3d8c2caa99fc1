#include "weft/cli/engine_args.h"

namespace weft::cli {

void DeclareLayoutOptions(OptionSet& options, EngineArgs& a) {
  options.Add("tensor-parallel-size", &a.tensor_parallel, "Ranks over which heads and matrices are split.")
      .Alias("-tp")
      .Range(1, 1024);
  options
      .Add("prefill-context-parallel-size", &a.prefill_context_parallel,
           "Ranks over which the tokens of a prompt are split.")
      .Alias("-pcp")
      .Range(1, 1024);
  options
      .Add(
          "decode-context-parallel-size", &a.decode_context_parallel,
          "Ranks over which the KV cache is split that would otherwise hold copies; divides the TP ranks of a KV head.")
      .Alias("-dcp")
      .Range(1, 1024);
  options
      .Add("cp-kv-cache-interleave-size", &a.kv_interleave,
           "Consecutive tokens that go to one shard of the KV cache; divides --block-size.")
      .Range(1);
  options
      .Add(
          "pcp-kv-layout", &a.pcp_kv_layout,
          "`sharded`: the KV cache is spread over the PCP ranks, too, for the most room; `replicated`: PCP divides the "
          "computation only, and every PCP rank holds a request's whole KV.")
      .Choices({"sharded", "replicated"});
  options.Add(
      "pcp-min-tokens", &a.pcp_min_tokens,
      "Prompts of fewer new tokens are not cut over the PCP ranks but run whole on one of them: `auto` or a number.");
}

void DeclareEngineOptions(OptionSet& options, EngineArgs& a) {
  EngineArgs::Foreign& f = a.foreign;
  options.Group("Model");
  options.Add("tokenizer", &a.tokenizer, "Folder, .gguf file or Hub id of the tokenizer.").DefaultText("the model's");
  options.Add("skip-tokenizer-init", &a.skip_tokenizer_init,
              "Load no tokenizer: prompts are token ids, and answers have token ids and no text.");
  options
      .Add("dtype", &a.dtype,
           "Type of the weights in memory. `auto` is bfloat16, whatever type the files have; sums are float32 always.")
      .Choices({"auto", "bfloat16", "float32"});
  options.Add("seed", &a.seed, "Seed of the requests that bring none of their own.").Range(0);
  options
      .Add("max-model-len", &a.max_model_len,
           "Tokens of prompt and output together that a request may have. -1: as many as fit into the KV cache.")
      .HumanReadable()
      .Range(-1)
      .Check([&a] { return a.max_model_len == 0 || a.max_model_len == 1 ? "must be at least 2, or -1" : ""; })
      .DefaultText("what the model was made for");
  options
      .Add("max-logprobs", &a.max_logprobs,
           "The most log-probabilities per token that a request may ask for. -1: the whole vocabulary.")
      .Range(-1);
  options.Add("hf-overrides", &a.hf_overrides, "Replaces fields of config.json: a JSON object, or dotted keys.");
  options
      .Add("generation-config", &a.generation_config,
           "Where sampling parameters come from that a request leaves out: `auto` is the model's "
           "generation_config.json, "
           "`vllm` none, else a folder with such a file.")
      .Metavar("auto|vllm|DIR");
  options.Add("override-generation-config", &a.override_generation_config,
              "Replaces fields of generation_config.json: a JSON object, or dotted keys.");
  options.Add("quantization", &f.quantization, "Quantization method.")
      .Alias("-q")
      .Refused("quantized computation is not available (the types of a GGUF file are read without this flag)");
  options.Add("load-format", &f.load_format, "Format of the weights.")
      .Choices({"auto", "safetensors", "gguf"})
      .Unused("the files tell what they are");
  options.Add("trust-remote-code", &f.trust_remote_code, "Run code that comes with the model.")
      .Unused("no code of a model is ever run");

  options.Group("Parallelism");
  DeclareLayoutOptions(options, a);
  options
      .Add("data-parallel-size", &a.data_parallel,
           "Replicas of the model behind one API, each with ranks (TP x PCP), a scheduler and a KV cache of its own. "
           "Limits on requests and tokens (--max-num-seqs, ...) are each replica's; memory is shared out.")
      .Alias("-dp")
      .Range(1, 1024);
  options
      .Add("enable-expert-parallel", &a.expert_parallel,
           "Whole experts on each of the DP x PCP x TP ranks, which then step together, instead of a TP slice of every "
           "expert on each.")
      .Alias("-ep");
  options
      .Add("cp-context-exchange", &a.context_exchange,
           "How a query meets the keys of other ranks: `gather-q` sends the query to them, `gather-kv` brings the keys "
           "to "
           "it, `auto` chooses for each request and step.")
      .Choices({"auto", "gather-q", "gather-kv"});
  options
      .Add("cp-context-segment-tokens", &a.context_segment_tokens,
           "Cached tokens that a prompt's later chunks bring from other processes, or expand from latents (MLA), at a "
           "time: what they need of memory does not grow with the context.")
      .Range(1);
  options.Add("threads-per-rank", &a.threads_per_rank, "Compute threads of a rank.")
      .Range(0, 4096)
      .DefaultText("the CPUs divided by the ranks");
  options.Add("kernels", &a.kernels, "`cpu`: SIMD; `ref`: the scalar reference, slow.").Choices({"auto", "cpu", "ref"});
  options.Add("distributed-executor-backend", &f.executor_backend, "How ranks run.")
      .Choices({"mp", "uni", "mpi"})
      .Unused("ranks are threads of this process, or of those that mpirun has started");
  options.Add("pipeline-parallel-size", &f.pipeline_parallel, "Stages over which layers are split.")
      .Alias("-pp")
      .Range(1)
      .Refused("must be 1: pipeline parallelism is not available");
  const char* const mpirun = "mpirun says this (docs/distributed.md)";
  const char* const asks = "mpirun says this; without mpirun it is an error that shows the mpirun line to type";
  options
      .Add("nnodes", &a.nodes.count,
           "Hosts. Without mpirun more than 1 is an error that shows the mpirun line to type; with it, a check.")
      .Alias("-n")
      .Range(1);
  options.Add("node-rank", &a.nodes.rank, "This host.").Alias("-r").Range(0).Unused(asks);
  options.Add("master-addr", &a.nodes.master_addr, "The first host.").Unused(mpirun);
  options.Add("master-port", &a.nodes.master_port, "Its port.").Range(1, 65535).Unused(mpirun);
  options.Add("headless", &a.nodes.headless, "A host without a server.").Unused(asks);
  options
      .Add("step-timeout", &a.step_timeout_s,
           "With several processes: seconds after which a step that has not ended counts as failed, and all processes "
           "with it.")
      .Range(0.1, 1e6);

  options.Group("KV cache");
  options.Add("block-size", &a.block_size, "Tokens of a block on one shard.").Range(1, 65536);
  options.Add("kv-cache-dtype", &a.kv_cache_dtype, "Type of keys and values. `auto`: as --dtype.")
      .Choices({"auto", "bfloat16", "float32"});
  options
      .Add(
          "kv-cache-memory", &a.kv_cache_memory,
          "Bytes of KV cache of all ranks together. Default: 4 GiB, or more where one request of --max-model-len needs "
          "it; never more than 70 % of the memory left after the weights, nor than --max-num-seqs longest requests "
          "can use.")
      .Alias("--kv-cache-memory-bytes")
      .HumanReadable()
      .Range(1)
      .Metavar("BYTES");
  options
      .Add("gpu-memory-utilization", &a.memory_utilization,
           "Share of the memory available at the start that weights and KV cache may take together; sizes the KV cache "
           "instead of its default. The name is vLLM's; here it is the host's memory.")
      .Range(0, 1)
      .Check([&a] { return *a.memory_utilization == 0 ? "must be above 0" : ""; });
  options
      .Add("num-gpu-blocks-override", &a.num_blocks_override,
           "Virtual blocks of the KV cache (--block-size x shards tokens each); goes before the two above.")
      .Range(1, INT32_MAX);
  options.Add("enable-prefix-caching", &a.prefix_caching,
              "Keep the KV of what was computed, for requests that begin alike (`cache_salt` separates them).");
  options.Add("swap-space", &f.swap_space, "GiB of host memory to swap KV to.")
      .Range(0)
      .Unused("a request that lacks room is computed again");
  options.Add("cpu-offload-gb", &f.cpu_offload, "GiB of weights kept in host memory.")
      .Range(0)
      .Refused("all weights are in host memory");
  options.Add("kv-transfer-config", &f.kv_transfer_config, "KV transfer between instances.")
      .Refused("disaggregated prefill and KV pools are not available");

  options.Group("Scheduler");
  options.Add("max-num-seqs", &a.max_num_seqs, "Requests that run at once.").HumanReadable().Range(1, 65536);
  options.Add("max-num-batched-tokens", &a.max_num_batched_tokens, "Tokens that are computed in one step.")
      .HumanReadable()
      .Range(1, INT32_MAX)
      .DefaultText("2048; without chunked prefill at least --max-model-len");
  options.Add("enable-chunked-prefill", &a.chunked_prefill, "Cut long prompts into steps.");
  options
      .Add("scheduling-policy", &a.scheduling_policy,
           "`priority`: requests may have a `priority`, lower ones first. `fcfs`: in order of arrival.")
      .Choices({"fcfs", "priority"});
  options.Add("async-scheduling", &f.async_scheduling, "Plan a step while another one runs.")
      .Refused("asynchronous scheduling is not available");
  options.Add("speculative-config", &f.speculative_config, "Speculative decoding.")
      .Refused("speculative decoding is not available");
  options.Add("compilation-config", &f.compilation_config, "Compilation of the model.")
      .Metavar("JSON")
      .Refused("there is nothing to compile");
  options.Add("enforce-eager", &f.enforce_eager, "Capture no graphs.").Unused("there are no graphs to capture");
  options.Add("additional-config", &f.additional_config, "Settings of a platform.").Refused("no such setting is known");

  options.Group("Logging");
  options.Add("log-level", &a.log_level, "Least severe messages to show.")
      .Choices({"trace", "debug", "info", "warning", "error", "critical", "off"});
}

}  // namespace weft::cli
