"""llama.cpp's side of `make bench`, through llama-cpp-python's C functions.

One batch of sequences; a sequence that has ended gives its place to the next
prompt, as in llama.cpp's own server. Weights and cache are float32.
"""

import time

import llama_cpp
import numpy as np

from tests.benchmarks.sides import side


def _open(job):
  llama_cpp.llama_backend_init()
  model_params = llama_cpp.llama_model_default_params()
  model = llama_cpp.llama_model_load_from_file(
    job['gguf'].encode(), model_params
  )
  if not model:
    raise OSError(f'{job["gguf"]}: llama.cpp cannot load it')
  longest = max(len(p['tokens']) + p['limit'] for p in job['prompts'])
  params = llama_cpp.llama_context_default_params()
  params.n_seq_max = job['batch']
  params.n_ctx = job['batch'] * (-(-longest // 256) * 256)
  params.n_batch = params.n_ubatch = 2048
  params.n_threads = params.n_threads_batch = job['threads']
  params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
  params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
  return model, llama_cpp.llama_init_from_model(model, params)


def _greedy(job):
  model, context = _open(job)
  vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
  memory = llama_cpp.llama_get_memory(context)
  prompts, stops = job['prompts'], set(job['stops'])
  batch = llama_cpp.llama_batch_init(2048, 0, 1)

  def add(token, position, sequence, wanted):
    at = batch.n_tokens
    batch.token[at], batch.pos[at] = token, position
    batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
    batch.logits[at] = wanted
    batch.n_tokens += 1
    return at

  def run(prompts):
    waiting = list(range(len(prompts)))
    made = [[] for _ in prompts]
    owners = [None] * job['batch']
    while waiting or any(i is not None for i in owners):
      batch.n_tokens, places = 0, {}
      for sequence, i in enumerate(owners):
        if i is None and waiting:
          i = owners[sequence] = waiting.pop(0)
          llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
          *read, last = prompts[i]['tokens']
          for position, token in enumerate(read):
            add(token, position, sequence, False)
          places[sequence] = add(last, len(read), sequence, True)
        elif i is not None:
          position = len(prompts[i]['tokens']) + len(made[i]) - 1
          places[sequence] = add(made[i][-1], position, sequence, True)
      if llama_cpp.llama_decode(context, batch):
        raise RuntimeError('llama_decode failed')
      for sequence, at in places.items():
        logits = llama_cpp.llama_get_logits_ith(context, at)
        token = int(np.ctypeslib.as_array(logits, (vocab,)).argmax())
        i = owners[sequence]
        made[i].append(token)
        if token in stops or len(made[i]) == prompts[i]['limit']:
          owners[sequence] = None
    return made

  run([prompts[0] | {'limit': 2}])
  start = time.perf_counter()
  made = run(prompts)
  return side.decoded(job, time.perf_counter() - start, made)


if __name__ == '__main__':
  side.main({'greedy': _greedy})
