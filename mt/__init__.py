"""Fine-tunes Gemma to translate. One room per stage; imports run one way only:

  configs < base < gemma < data < weights < translate < evaluate < train < doors

The doors are train.py, mt/export and each room's __main__.py. To read the core,
from a pair to a gradient to a translation, take these twelve in turn; nothing
in them needs a look ahead. An indented file may be left for later: its line
here says all that the file below it needs of it.

    data/chat           turns of a chat, for instruction-tuned models
  data/template       how a pair becomes tokens: prompt, target, what is learned
    data/packing        which pairs share a row
    data/epochs         which examples stand in which row, epoch after epoch
  data/batches        rows of tokens, in an order that one integer remembers
  gemma/sizes         the published Gemmas as data; the letters of all shapes
  gemma/parameters    the table: one row says all there is to know of a weight
    gemma/sharding      arrays over a mesh; without one, it does nothing
  gemma/attention     masks, RoPE, softmax over packed rows
    gemma/fused         the same by a GPU's or TPU's own kernel
    gemma/embedding     token vectors, and the gradient of their look-up
    gemma/quantize      frozen matrices in 8 or 4 bits
    gemma/products      matrix products in the forms that machines are fast at
    gemma/stacks        one scan over the layers; Gemma 4's have several shapes
  gemma/model         the forward pass
    gemma/loss_chunk    a chunk of targets against the vocabulary
    gemma/loss_loop     all chunks of targets, on each device of a mesh
  gemma/loss          cross-entropy: its definition, and the same in chunks
  gemma/lora          all weights, a part, or LoRA: what is trained
    train/state         what training changes, in one pytree
  train/step          gradients, accumulation, the two jitted steps
    train/components    what a run is made of: steps, data, translator, …
    train/validation    losses and chrF while training lasts
    train/log           what is recorded of a step, and the progress bar
  train/loop          evaluate, save, next batch, step, log
    translate/kv_cache  what has been read, and which of it a token sees
  translate/decode    the model with a key/value cache
    translate/next_token  the best of the logits, a random draw, no repetitions
  translate/search    greedy, sampled and beam search

The rest, by room:

base, what every room stands on
  errors      one sentence for the person at the terminal
  foreign     what a file is that was taken for another
  cli         flags, --help with every knob, exit codes
  accelerator  which one is there, and whether JAX sees it
  cache       the folder of what is kept between runs
  files       files that are written whole or not at all
  compiling   compile once, keep what was compiled
  processes   several processes of one run
  run_folder  the files of a run, and what a resume may change
  screen      what a terminal cannot show ends no run
  journal     metrics.jsonl, progress bar, lines
  recorder    metrics, for TensorBoard and Weights & Biases too
  profiling   a trace of some steps
  signals     SIGTERM, SIGHUP, a cloud's notice, …: save and leave

data, from parallel text to rows of tokens; `python -m mt.data` shows them
  formats     files as they lie on disk -> plain lines
  line_index  where the lines of a file begin
  lines       a line -> a pair, or why it is none
  columns     what the columns of a text mean, checked on its lines
  faults      what spoils a result: leaks, copies, other scripts, …
  typography  signs that are written in several ways, such as ' and ’
  bitext      parallel text on disk: bad lines counted, pairs read by number
  mtnt        MTNT 1.1 fetched; archives unpacked
  sacrebleu_sets  test sets by name
  directions  several directions in one run
  noising     noise on purpose
  corpus      `data.source` and its splits -> parallel texts
  tokenizer   SentencePiece: from a file, or trained
  store       tokenised pairs on disk, mapped into memory
  splits      all that a run reads

weights, pretrained ones in, trained ones out
  load        the checked loader: tensors of files -> the stacked pytree
  kept        in which format, and where on a mesh; which process reads what
  mapped      dequantised weights, kept on disk and mapped into memory
  gguf_file   GGUF header and tensors
  gguf        shape, tokenizer and parameters out of a GGUF file
  gguf_out    parameters and tokenizer -> a GGUF file
  flax_store  the arrays of an Orbax folder, in and out
  flax        the same out of Google's own Flax checkpoints
  flax_out    parameters -> that layout
  hf_config   config.json of a folder of Hugging Face's
  hf_config_out  a model's shape -> that file
  hf_tokenizer  its tokenizer.json
  hf_tokenizer_out  a tokenizer -> that file
  hf          the same out of such a folder, and into one
  peft        LoRA factors <-> an adapter folder of PEFT's
  hub         models from the Hugging Face hub, and to it
  kaggle      checkpoints from Kaggle
  pretrained  `weights.source` -> model shape, tokenizer, parameters

translate, text to text; `python -m mt.translate`
  batching    continuous batching: free rows are filled again
  mbr         of several translations the one most like all of them
  loops       translations that go round and round
  translator  text to text

evaluate, how good that is; `python -m mt.evaluate`
  noise       what is noisy about a sentence: classes found by rules
  scores      BLEU and chrF: of all, by noise, of two systems
  comet       COMET, in an environment of its own
  comet_program  what runs there
  cached      translations that are there are not made again
  card        the model card of an export
  sentences   texts side by side, with their differences marked
  chart       curves as SVG
  report      report.html: a run on one page
  comparison  several runs on one page

train, the run
  settings    impossible values in a config, refused early
  machine     what is `auto` in a config, chosen for the devices
  optimizer   learning rate, SGD, AdamW, Adafactor, clipping
  manifest    damaged checkpoints found out and moved aside; their version
  checkpoint  Orbax: state and data position, and whose they are; the best
  warm_start  the trained weights of another run, or an adapter's
  usage       tokens/s, MFU, memory of a step
  targets     accelerators that are not here, for their compilers
  roofline    the time of a compiled program, kernel by kernel
  programs    all that a run compiles, from shapes alone
  alternatives  knobs with which a run that does not fit would
  plan        `--plan`: memory and time of a run before it starts
  run         a run from config to scores, around the loop

export, `python -m mt.export`: a run's model for other programs

To change the prompt: configs/. A weight: gemma/parameters and gemma/model. The
objective: train/step. The optimizer: train/optimizer and configs/default. A
knob: configs/default. docs/fork.md walks through three such changes.
"""
