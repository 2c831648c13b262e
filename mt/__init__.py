"""Fine-tunes Gemma to translate. One file per noun, read in this order:

  settings    impossible values in a config, refused early
  mtnt        MTNT 1.1 fetched; archives unpacked
  lines       a line of a file -> a pair, or why it is none
  bitext      parallel text on disk: bad lines counted, pairs read by number
  corpus      `data.source` and its splits -> parallel texts
  tokenizer   SentencePiece: from a file, a GGUF vocabulary, or trained
  template    prompts: how a pair becomes tokens
  store       tokenised pairs on disk, mapped into memory
  batches     examples -> packed or padded rows -> Grain iterator
  data        all that a run reads
  card        `python -m mt.corpus`: the data, counted and shown
  sizes       the published Gemmas as data
  gguf_file   GGUF header and tensors
  weights     `weights.source` -> model shape, tokenizer, parameters
  weights_gguf  the same out of a GGUF file
  stacking    tensors of single layers -> the stacked pytree
  model       the Gemma forward pass over a plain pytree
  loss        cross-entropy over a large vocabulary
  trainable   all weights, blocks, or LoRA: what is trained, what is frozen
  step        TrainState, optimizer, train_step, eval_step
  checkpoint  Orbax: state and data position, and whose they are
  loop        a run from config to scores, in one fixed order
  decode      the model with a key/value cache
  search      greedy, sampled and beam search
  pool        prompts through a batch whose free rows are filled again
  translate   text to text
  terminal    `python -m mt.translate`: lines, files, JSON, a prompt
  evaluate    BLEU, chrF, samples

  compiling   compile once, keep what was compiled
  journal     metrics.jsonl, progress bar, lines
  workdir     the other files of a run
  errors      one sentence for the person at the terminal

To change the prompt: configs/. The data: corpus, lines. The loss: loss, step.
What is trained: trainable. The optimizer: step. The search: search.
"""
