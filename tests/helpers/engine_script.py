"""Start vLLM on one model after another and print what it computes: ``engine_script.py JOBS``, a JSON array of

    {"model": directory, "options": keywords of LLM, "prompts": lists of token ids, "max_tokens": n,
     "reload": directory of a checkpoint whose weights take the place of the first ones,
     "regex": what every answer must match, "lora": directory of an adapter, "logprobs": false where the engine cannot give them}

The last line on stdout is a JSON array of {"logprobs": per prompt, of every token after the first, "tokens": per prompt,
the greedy continuation, "graphs" that torch.compile made in this process, "graph_breaks"} or, where the engine refused
to start, {"error": message}. A process of its own, so that no state of the engine reaches the tests.
"""

import gc
import json
import sys
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    from torch._dynamo.utils import counters
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    counters.clear()
    options = {"enforce_eager": True, "max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 4,
               "disable_log_stats": True, **job.get("options", {})}
    llm = LLM(model=job["model"], **options)
    if "reload" in job:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
    structure = StructuredOutputsParams(regex=job["regex"]) if "regex" in job else None
    scored = job.get("logprobs", True)
    parameters = SamplingParams(temperature=0, max_tokens=job.get("max_tokens", 8), prompt_logprobs=0 if scored else None,
                                ignore_eos=structure is None, structured_outputs=structure)
    lora = LoRARequest("adapter", 1, job["lora"]) if "lora" in job else None
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], parameters, use_tqdm=False, lora_request=lora)
    result = {
        "logprobs": [[entry[token].logprob for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
                     for prompt, output in zip(job["prompts"], outputs, strict=True)] if scored else None,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values()),
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return result


def main() -> None:
    results = []
    for job in json.loads(sys.argv[1]):
        try:
            results.append(run(job))
        except Exception as error:  # reported, the test judges it
            results.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
