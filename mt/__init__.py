"""Fine-tunes Gemma to translate. One file per noun, read in this order:

  settings    impossible values in a config, refused early
  mtnt        MTNT 1.1 fetched; archives unpacked
  corpus      parallel text on disk -> pairs
  tokenizer   SentencePiece: from a file, a GGUF vocabulary, or trained
  batches     pairs -> tokens and masks -> packed rows -> Grain iterator
  sizes       the published Gemmas as data
  gguf_file   GGUF header and tensors
  weights     `weights.source` -> model shape, tokenizer, parameters
  weights_gguf  the same out of a GGUF file
  stacking    tensors of single layers -> the stacked pytree
  model       the Gemma forward pass over a plain pytree
  loss        cross-entropy over a large vocabulary
  precision   which numbers are float32, which may be bfloat16
  trainable   all weights, a part, or LoRA: what is trained, what is frozen
  optimizer   learning rate, SGD, AdamW, Adafactor, clipping
  sharding    arrays over a mesh of devices
  distributed  several processes of one run
  step        TrainState, accumulation, train_step, eval_step
  checkpoint  Orbax: state and data position, and whose they are
  hlo         work and traffic of a compiled program
  plan        `--plan`: memory, work and traffic of a run before it starts
  loop        a run from config to scores, in one fixed order
  decode      greedy decoding with a key/value cache
  translate   text to text; `python -m mt.translate`
  evaluate    BLEU, chrF, samples

  compiling   compile once, keep what was compiled
  journal     metrics.jsonl, progress bar, lines
  workdir     the other files of a run
  errors      one sentence for the person at the terminal

To change the prompt: configs/. The data: corpus. The loss: loss, step. What is
trained: trainable. The optimizer: step. The search: decode.
"""
