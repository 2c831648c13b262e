"""Fine-tunes Gemma to translate. One room per stage; imports run one way only:

  base < gemma < data < weights < translate < evaluate < train < front doors

base, what every room stands on
  errors      one sentence for the person at the terminal
  cache       the folder of what is kept between runs
  compiling   compile once, keep what was compiled
  processes   several processes of one run
  run_folder  the files of a run
  journal     metrics.jsonl, progress bar, lines
  events      metrics for TensorBoard
  signals     SIGINT and SIGTERM: save and leave

gemma, the model as pure functions over a plain pytree
  sizes       the published Gemmas as data
  sharding    arrays over a mesh of devices
  precision   which numbers are float32, which may be bfloat16
  attention   masks, RoPE, softmax over packed rows
  model       the forward pass
  loss        cross-entropy over a large vocabulary
  lora        all weights, a part, or LoRA: what is trained, what is frozen

data, from parallel text to rows of tokens; `python -m mt.data` shows them
  lines       a line of a file -> a pair, or why it is none
  bitext      parallel text on disk: bad lines counted, pairs read by number
  mtnt        MTNT 1.1 fetched; archives unpacked
  corpus      `data.source` and its splits -> parallel texts
  tokenizer   SentencePiece: from a file, or trained
  template    prompts: how a pair becomes tokens
  store       tokenised pairs on disk, mapped into memory
  batches     examples -> packed or padded rows -> Grain dataset
  reader      batches read ahead, with a position; dead or silent readers
  splits      all that a run reads

weights, pretrained ones in, trained ones out
  gguf_file   GGUF header and tensors
  load        tensors of single layers -> the stacked pytree
  gguf        shape, tokenizer and parameters out of a GGUF file
  flax_store  the arrays of an Orbax folder, in and out
  flax        the same out of Google's own Flax checkpoints
  flax_out    parameters -> that layout
  hf_config   config.json of a folder of Hugging Face's
  hf_tokenizer  its tokenizer.json
  safetensors_out  tensors to files, one at a time
  hf          the same out of such a folder, and into one
  peft        LoRA factors -> an adapter folder of PEFT's
  kaggle      checkpoints from Kaggle
  pretrained  `weights.source` -> model shape, tokenizer, parameters

translate, text to text; `python -m mt.translate`
  decode      the model with a key/value cache
  search      greedy, sampled and beam search
  batching    prompts through a batch whose free rows are filled again
  translator  text to text

evaluate, how good that is; `python -m mt.evaluate`
  noise       what is noisy about a sentence: classes found by rules
  scores      BLEU and chrF: of all, by noise, of two systems
  cached      translations that are there are not made again
  samples     sentences to read
  sentences   texts side by side with their differences marked
  chart       curves as SVG
  report      report.html: a run on one page

train, the run
  settings    impossible values in a config, refused early
  optimizer   learning rate, SGD, AdamW, Adafactor, clipping
  step        TrainState, accumulation, train_step, eval_step
  manifest    damaged checkpoints found out and moved aside
  checkpoint  Orbax: state and data position, and whose they are; the best
  hlo         work and traffic of a compiled program
  plan        `--plan`: memory, work and traffic of a run before it starts
  memory      what a run needs at the least, against what there is
  run         what does not change while a run lasts
  warm_start  the trained weights of another run, and nothing else of it
  results     translations before and after training, scored
  validation  losses and chrF while training lasts
  training    the steps: evaluate, save, next batch, step, log
  loop        a run from config to scores, in one fixed order

export is `python -m mt.export`: a run's model for other programs.
"""
