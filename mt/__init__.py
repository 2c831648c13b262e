"""Fine-tunes Gemma to translate. One file per noun, read in this order:

  settings    impossible values in a config, refused early
  mtnt        MTNT 1.1 fetched; archives unpacked
  lines       a line of a file -> a pair, or why it is none
  bitext      parallel text on disk: bad lines counted, pairs read by number
  corpus      `data.source` and its splits -> parallel texts
  tokenizer   SentencePiece: from a file, a GGUF vocabulary, or trained
  template    prompts: how a pair becomes tokens
  store       tokenised pairs on disk, mapped into memory
  batches     examples -> packed or padded rows -> Grain dataset
  reader      batches read ahead, with a position; dead or silent readers
  data        all that a run reads
  card        `python -m mt.corpus`: the data, counted and shown
  sizes       the published Gemmas as data
  gguf_file   GGUF header and tensors
  weights     `weights.source` -> model shape, tokenizer, parameters
  weights_gguf  the same out of a GGUF file
  weights_flax  the same out of Google's own Flax checkpoints
  flax_store  the arrays of an Orbax folder, in and out
  kaggle      checkpoints from Kaggle
  weights_hf  the same out of a folder of Hugging Face's, and into one
  hf_config   its config.json
  tokenizer_json  its tokenizer.json
  safetensors_out  tensors to files, one at a time
  stacking    tensors of single layers -> the stacked pytree
  attention   masks, RoPE, softmax over packed rows
  model       the Gemma forward pass over a plain pytree
  loss        cross-entropy over a large vocabulary
  precision   which numbers are float32, which may be bfloat16
  trainable   all weights, a part, or LoRA: what is trained, what is frozen
  optimizer   learning rate, SGD, AdamW, Adafactor, clipping
  sharding    arrays over a mesh of devices
  distributed  several processes of one run
  step        TrainState, accumulation, train_step, eval_step
  manifest    damaged checkpoints found out and moved aside
  checkpoint  Orbax: state and data position, and whose they are; the best
  warm_start  the trained weights of another run, and nothing else of it
  hlo         work and traffic of a compiled program
  plan        `--plan`: memory, work and traffic of a run before it starts
  run         what does not change while a run lasts
  loop        a run from config to scores, in one fixed order
  training    its steps: evaluate, save, next batch, step, log
  memory      what a run needs at the least, against what there is
  validation  losses and chrF while training lasts
  results     translations before and after training, scored
  decode      the model with a key/value cache
  search      greedy, sampled and beam search
  pool        prompts through a batch whose free rows are filled again
  translate   text to text
  terminal    `python -m mt.translate`: lines, files, JSON, a prompt
  noise       what is noisy about a sentence: classes found by rules
  scores      BLEU and chrF: of all, by noise, of two systems
  evaluate    `python -m mt.evaluate`: a run's translations, scored, compared
  export_flax  parameters -> Google's own Flax layout
  weights_peft  LoRA factors -> an adapter folder of PEFT's
  export      a run's model for other programs; `python -m mt.export`

  report      report.html: a run on one page
  sentences   texts side by side with their differences marked
  chart       curves as SVG
  events      metrics for TensorBoard

  compiling   compile once, keep what was compiled
  journal     metrics.jsonl, progress bar, lines
  workdir     the other files of a run
  signals     SIGINT and SIGTERM: save and leave
  errors      one sentence for the person at the terminal

To change the prompt: configs/. The data: corpus, lines. The loss: loss, step.
What is trained: trainable. The optimizer: optimizer. The search: search.
The page of a run: report.
"""
