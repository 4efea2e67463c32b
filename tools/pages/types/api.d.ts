// Written by python -m tools.schemas of docs/schemas/openapi.json.
declare namespace Api {
  interface ErrorAnswer {
    error: ErrorFacts;
  }
  interface ErrorFacts {
    kind: string;
    message: string;
    details?: any;
  }
  interface StatusAnswer {
    version: string;
    docs: string;
    ready: boolean;
    base_dir: string;
    devices: (TrainingDevice)[];
    queue: QueueCounts;
    disk_free_bytes: number;
    draining: boolean;
  }
  interface TrainingDevice {
    name: string;
    title: string;
    memory_bytes: number | null;
    free_bytes: number | null;
  }
  interface QueueCounts {
    pending: number;
    running: number;
  }
  interface DrainBody {
    drain?: boolean;
  }
  interface SettingsAnswer {
    groups: (SettingGroup)[];
    presets: (Preset)[];
  }
  interface SettingGroup {
    title: string;
    settings: (SettingAnswer)[];
  }
  interface SettingAnswer {
    name: string;
    label: string;
    type: "boolean" | "integer" | "number" | "text";
    default: boolean | number | number | string | null;
    help: string;
    min: number | null;
    max: number | null;
    step: number | null;
    choices: (string)[];
    main: boolean;
  }
  interface Preset {
    name: string;
    title: string;
    summary: string;
    settings: Record<string, any>;
    seen_per_image: number;
    least_seen: number;
    most_seen: number;
  }
  interface ModelListAnswer {
    models: (ModelRow)[];
    other: (OtherFile)[];
    notes: (string)[];
  }
  interface ModelRow {
    name: string;
    title: string;
    family: string;
    place: string;
    size_bytes: number;
    precision: string;
    builtin: boolean;
    ready: boolean;
    missing: (MissingPart)[];
    seconds: number | null;
    seconds_per_picture: number | null;
    best: boolean;
    clips: boolean;
    edits: (string)[];
    edit: string;
    recognised_by: string;
    takes_controls: boolean;
  }
  interface MissingPart {
    part: string;
    usual_file: string;
    on_hub: boolean;
  }
  interface OtherFile {
    name: string;
    place: string;
    what: string;
    size_bytes: number;
    recognised: boolean;
  }
  interface ShelfAnswer {
    models: (ShelfRow)[];
  }
  interface ShelfRow {
    name: string;
    title: string;
    family: string;
    about: string;
    licence: string;
    card: string;
    gated: boolean;
    files: (ShelfFileRow)[];
    seconds: number | null;
    seconds_per_picture: number | null;
    best: boolean;
    clips: boolean;
    edits: boolean;
    least_memory_bytes: number | null;
    fits: boolean | null;
  }
  interface ShelfFileRow {
    part: string;
    file: string;
    size_bytes: number;
    kept_bytes: number;
    found: boolean;
  }
  interface CaptionerList {
    captioners: (CaptionerRow)[];
    notes: (string)[];
  }
  interface CaptionerRow {
    name: string;
    title: string;
    found: boolean;
    about: string;
    licence: string;
    card: string;
    size_bytes: number;
    kept_bytes: number;
  }
  interface ReleaseMemory {
    memory_bytes: number;
    fits: boolean | null;
    encoders_fit: boolean | null;
  }
  interface AddedModel {
    file: string;
    place: string;
    model: string;
  }
  interface DownloadList {
    downloads: (DownloadAnswer)[];
  }
  interface DownloadAnswer {
    id: string;
    subject: string;
    title: string;
    state: string;
    file: string;
    done_bytes: number;
    total_bytes: number;
    bytes_per_s: number;
    is_checking: boolean;
    error: string;
    accept: string;
  }
  interface DownloadBody {
    kind: "captioner" | "model" | "release";
    name: string;
  }
  interface DownloadCheck {
    title: string;
    files: (FileToGet)[];
    free_bytes: number;
  }
  interface FileToGet {
    file: string;
    repository: string;
    folder: string;
    size_bytes: number;
    kept_bytes: number;
  }
  interface RemovedDownload {
    id: string;
  }
  interface HubTokenBody {
    token: string;
  }
  interface StoredToken {
    stored: boolean;
  }
  interface DatasetList {
    datasets: (DatasetRow)[];
  }
  interface DatasetRow {
    name: string;
    images: number;
    captions: number;
    modified: number;
    cover: string | null;
    covers: (string)[];
    builtin: boolean;
  }
  interface FormatsAnswer {
    pictures: (string)[];
    captions: (string)[];
    refused: Record<string, string>;
  }
  interface NameBody {
    name: string;
  }
  interface DatasetAnswer {
    name: string;
    folder: string;
    images: (PictureRow)[];
    builtin: boolean;
    notes: (string)[];
    skipped: (SkippedFile)[];
    controls: (ControlRow)[];
  }
  interface PictureRow {
    file: string;
    width: number | null;
    height: number | null;
    bytes: number;
    caption: string;
    has_caption: boolean;
    problem: string;
    controls: (ControlRow)[];
    crop: Crop | null;
    mask: string;
  }
  interface ControlRow {
    file: string;
    width: number | null;
    height: number | null;
    fixed: boolean;
    problem: string;
  }
  interface Crop {
    x: number;
    y: number;
    width: number;
    height: number;
  }
  interface SkippedFile {
    file: string;
    reason: string;
  }
  interface RemovedAnswer {
    removed: string;
  }
  interface UploadAnswer {
    added: (string)[];
    skipped: (SkippedFile)[];
    renamed: Record<string, string>;
    replaced: Record<string, string>;
  }
  interface CroppedAnswer {
    file: string;
  }
  interface FilesBody {
    files: (string)[];
  }
  interface RestoreBody {
    removed: string;
    control?: boolean;
  }
  interface Changed {
    changed: number;
  }
  interface PairBody {
    control: string;
    image?: string;
    former?: string;
  }
  interface CaptionEdit {
    caption: string;
    seen?: string | null;
  }
  interface CaptioningBody {
    captioner: string;
    files?: (string)[];
    overwrite?: boolean;
    trigger?: string;
  }
  interface JobAnswer {
    id: string;
    kind: string;
    state: string;
    number: number;
    title: string;
    name: string | null;
    model: string | null;
    dataset: string | null;
    created: number;
    started: number | null;
    ended: number | null;
    outputs: Record<string, any>;
    error: Record<string, any> | null;
    run: string | null;
    attempts: number;
    about: string | null;
    wish: string | null;
    gives_way: boolean;
    key: string | null;
    priority: number;
    deadline: number | null;
    limits: Record<string, any>;
    submitter: string | null;
    request: Record<string, any>;
  }
  interface DataCheckAnswer {
    findings: (FindingFacts)[];
    images: Record<string, CheckedPicture>;
    skipped: (SkippedFile)[];
    notes: (string)[];
    resolutions: (number)[];
    assumed: boolean;
    held_out: (string)[];
    samples_per_epoch: number;
  }
  interface FindingFacts {
    kind: string;
    message: string;
    files: (string)[];
    severity: "problem" | "remark" | "warning";
    title: string;
    removes: (string)[];
  }
  interface CheckedPicture {
    problems: (string)[];
    crop: Crop;
    trained: [number, number];
    tokens: number | null;
  }
  interface DraftAnswer {
    draft: Draft;
    version: number;
  }
  interface Draft {
    name: string;
    trigger: string;
    model: string | null;
    edit: string | null;
    is_chosen: boolean;
    what: "" | "edit" | "person" | "pet" | "slider" | "style" | "thing";
    pairs: boolean | null;
    preset: string;
    teaches: "" | "style" | "subject";
    settings: Record<string, any>;
    measurement: string | null;
    again: string;
  }
  interface DraftBody {
    draft: Draft;
    seen?: Draft | null;
  }
  interface PlanBody {
    model: string;
    settings?: Record<string, any>;
    dataset?: string | null;
    folder?: string | null;
    trigger?: string;
    edit?: string | null;
    preset?: string;
    teaches?: "" | "style" | "subject";
  }
  interface PlanAnswer {
    steps: number;
    seen: number;
    epochs: number;
    rank: number;
    resolution: number;
    images: number;
    held_out: number;
    parameters: number;
    memory_bytes: number | null;
    fits: boolean | null;
    memory_settings: Record<string, any>;
    seconds_per_step: number | null;
    seconds: number | null;
    measured_at: number | null;
    estimated_seconds: number | null;
    slowdown: number;
    notes: (string)[];
    teaches: string;
    teaches_because: string;
    recipe: Record<string, any>;
    distilled: string;
    usual_adapter: string;
  }
  interface MeasurementBody {
    model: string;
    settings?: Record<string, any>;
  }
  interface JobList {
    jobs: (JobAnswer)[];
    total: number;
  }
  interface JobBody {
    model: string;
    settings?: Record<string, any>;
    dataset?: string | null;
    folder?: string | null;
    trigger?: string;
    edit?: string | null;
    preset?: string;
    teaches?: "" | "style" | "subject";
    kind?: "train";
    name?: string;
    front?: boolean;
    evaluate?: boolean;
    key?: string;
    priority?: number;
    deadline?: number | null;
    limits?: JobLimits;
    notify?: string;
  }
  interface JobLimits {
    steps?: number | null;
    minutes?: number | null;
    memory_bytes?: number | null;
  }
  interface RemovedJob {
    id: string;
  }
  interface CancelBody {
    pause?: boolean;
  }
  interface MoveBody {
    front?: boolean;
  }
  interface RunList {
    runs: (RunRow)[];
    damaged: (SkippedFile)[];
    total: number;
  }
  interface RunRow {
    id: string;
    name: string;
    state: "cancelled" | "failed" | "finished" | "interrupted" | "running" | "stopped";
    started: number | null;
    seconds: number;
    step: number;
    steps: number | null;
    model: string;
    family: string;
    loss: number | null;
    loss_label: string;
    held_out: number | null;
    cover: string | null;
    subject: string;
    teaches: "" | "edit" | "slider" | "style" | "subject";
    job: string | null;
    label: string;
    starred: boolean;
    note: string;
  }
  interface RunAnswer {
    id: string;
    name: string;
    state: "cancelled" | "failed" | "finished" | "interrupted" | "running" | "stopped";
    started: number | null;
    seconds: number;
    step: number;
    steps: number | null;
    model: string;
    family: string;
    loss: number | null;
    loss_label: string;
    held_out: number | null;
    cover: string | null;
    status: string;
    mood: string;
    settings: (RunSetting)[];
    changed: Record<string, any>;
    trigger: string;
    losses: ([number, number | null])[];
    smooth: ([number, number | null])[];
    rates: ([number, number | null])[];
    validations: (ValidationFacts)[];
    base_loss: number | null;
    likenesses: (LikenessFacts)[];
    previews: (PreviewFacts)[];
    pairs: (PairFacts)[];
    drawn: (DrawnPrompt)[];
    images: (RunPicture)[];
    advice: (PictureAdvice)[];
    advice_summary: string;
    left_out: (SkippedFile)[];
    lora: LoraFacts | null;
    saves: (SavedLora)[];
    recommended: RecommendedLora | null;
    best_step: number | null;
    verdict: string;
    facts: Record<string, string>;
    sentences: (string)[];
    notes: (RunNote)[];
    use: Record<string, [string, string]>;
    command: string;
    commands: Record<string, string>;
    files: (string)[];
    folder: string;
    is_trainable_on: boolean;
    dataset: string | null;
    subject: string;
    teaches: "" | "edit" | "slider" | "style" | "subject";
    job: string | null;
    label: string;
    starred: boolean;
    note: string;
    asked: (AskedPrompt)[];
  }
  interface RunSetting {
    name: string;
    value: any;
    help: string;
    group: string;
  }
  interface ValidationFacts {
    step: number;
    loss: number | null;
    base_loss: number | null;
    low: number | null;
    high: number | null;
    best: boolean;
  }
  interface LikenessFacts {
    step: number;
    likeness: number;
    own: number | null;
    adherence: number | null;
  }
  interface PreviewFacts {
    step: number;
    strength: number;
    prompt: string;
    number: number;
    file: string;
  }
  interface PairFacts {
    title: string;
    number: number;
    file: string;
  }
  interface DrawnPrompt {
    id: string;
    prompt: string;
    strength: number;
    seed: number;
    lora: string;
    pictures: (string)[];
    step: number;
    note: string;
    error: string;
  }
  interface RunPicture {
    file: string;
    caption: string;
    use: string;
    thumbnail: string | null;
    standing: string;
    controls: number;
  }
  interface PictureAdvice {
    file: string;
    finding: "learnt by heart" | "never learnt";
    reason: string;
    remedy: string;
    drawn_less: string;
  }
  interface LoraFacts {
    file: string;
    bytes: number;
    installed: string | null;
  }
  interface SavedLora {
    step: number;
    file: string;
    bytes: number;
    best: boolean;
  }
  interface RecommendedLora {
    sentence: string;
    is_judged: boolean;
    step: number | null;
    file: string;
    bytes: number;
  }
  interface RunNote {
    kind: string;
    message: string;
    step: number | null;
  }
  interface AskedPrompt {
    id: string;
    prompt: string;
    strength: number;
    seed: number;
    lora: string;
  }
  interface MarksBody {
    title?: string | null;
    starred?: boolean | null;
    note?: string | null;
  }
  interface RunMarks {
    title: string;
    starred: boolean;
    note: string;
  }
  interface InstallBody {
    step?: number | null;
    name?: string;
  }
  interface InstalledLora {
    installed: string;
    was_there: boolean;
  }
  interface DrawingFacts {
    control: "none" | "optional" | "required";
    least_strength: number;
    strengths: (number)[];
  }
  interface KeptControl {
    control: string;
  }
  interface DrawingBody {
    prompt: string;
    strength?: number;
    seed?: number;
    control?: string;
    lora?: string;
    strengths?: (number)[];
  }
  interface RequestBody {
    what: "drawing" | "preview" | "save";
    drawing?: DrawingBody | null;
  }
  interface RequestAnswer {
    id: string;
  }
  interface EvaluationAnswer {
    evaluation: Evaluation | null;
    folder: string;
    subject: string;
    pictures: number;
    seconds: number | null;
  }
  interface Evaluation {
    title: string;
    model: string;
    trigger: string;
    seed: number;
    sampling_steps: number;
    prompts: (string)[];
    base: (string)[];
    loras: (EvaluatedLora)[];
    training: Training;
    verdict: Verdict;
    sentence: string;
    strengths: (StrengthRow)[];
    notes: (string)[];
  }
  interface EvaluatedLora {
    file: string;
    label: string;
    step: number | null;
    measures: Measures;
    pictures: (string)[];
  }
  interface Measures {
    likeness: number | null;
    adherence: number | null;
    diversity: number | null;
    memorisation: number | null;
    drift: number | null;
    bleed: number | null;
    change: number;
  }
  interface Training {
    count: number;
    self_likeness: number | null;
    base_likeness: number | null;
  }
  interface Verdict {
    outcome: "changes nothing" | "ignores prompts" | "no pictures" | "not comparable" | "nothing learnt" | "use";
    best: number | null;
    ignored_from: number | null;
    copied: boolean;
  }
  interface StrengthRow {
    strength: number;
    pictures: (string)[];
  }
  interface EvaluationBody {
    subject?: string;
  }
  interface GalleryAnswer {
    kinds: Record<string, (string)[]>;
    steps: (number)[];
    strengths: (number)[];
    grids: (Grid)[];
    subject: string;
  }
  interface Grid {
    wish: string;
    prompt: string;
    seed: number;
    base: string;
    cells: (GridCell)[];
  }
  interface GridCell {
    step: number;
    strength: number;
    file: string;
  }
  interface GalleryBody {
    wish: string;
    subject?: string;
  }
  interface HubFolderBody {
    step?: number | null;
    trigger?: string;
    base_model?: string;
    licence?: string;
    private_captions?: boolean;
    with_training_pictures?: boolean;
  }
  interface HubFolder {
    folder: string;
    files: (HubFile)[];
    base_models: (string)[];
    trigger: string;
    licence: string;
    pictures: number;
    notes: (string)[];
    told: Record<string, string>;
    can_upload: boolean;
  }
  interface HubFile {
    path: string;
    bytes: number;
  }
  interface HubUploadBody {
    repository: string;
    folder: HubFolderBody;
    told?: (string)[];
    public?: boolean;
  }
  interface HubUpload {
    repository: string;
    address: string;
    is_private: boolean;
  }
  interface TrainOnBody {
    steps: number;
    evaluate?: boolean;
  }
  interface SweepList {
    sweeps: (SweepRow)[];
    damaged: (SkippedFile)[];
  }
  interface SweepRow {
    id: string;
    runs: number;
    states: Record<string, number>;
  }
  interface SweepBody {
    model: string;
    settings?: Record<string, any>;
    dataset?: string | null;
    folder?: string | null;
    trigger?: string;
    edit?: string | null;
    preset?: string;
    teaches?: "" | "style" | "subject";
    name?: string;
    grid?: Record<string, (any)[]>;
  }
  interface SweepAnswer {
    id: string;
    comparable: boolean;
    runs: (SweepRunRow)[];
  }
  interface SweepRunRow {
    name: string;
    run: string;
    settings: Record<string, any>;
    state: string;
    place: number | null;
    loss: number | null;
    best_step: number | null;
    change: number | null;
    steps: number;
    error: string;
    cover: string | null;
  }
  type Get =
    | { path: ["status"]; query: { }; body: {}; answer: StatusAnswer }
    | { path: ["settings"]; query: { images?: number | null; }; body: {}; answer: SettingsAnswer }
    | { path: ["models"]; query: { }; body: {}; answer: ModelListAnswer }
    | { path: ["shelf"]; query: { }; body: {}; answer: ShelfAnswer }
    | { path: ["captioners"]; query: { }; body: {}; answer: CaptionerList }
    | { path: ["shelf", string, "memory"]; query: { }; body: {}; answer: ReleaseMemory }
    | { path: ["downloads"]; query: { }; body: {}; answer: DownloadList }
    | { path: ["datasets"]; query: { name?: string | null; }; body: {}; answer: DatasetList }
    | { path: ["formats"]; query: { }; body: {}; answer: FormatsAnswer }
    | { path: ["datasets", string]; query: { }; body: {}; answer: DatasetAnswer }
    | { path: ["datasets", string, "images", string]; query: { width?: number | null; original?: boolean | null; mask?: boolean | null; }; body: {}; answer: any }
    | { path: ["datasets", string, "controls", string]; query: { width?: number | null; }; body: {}; answer: any }
    | { path: ["datasets", string, "check"]; query: { model?: string | null; edit?: string | null; trigger?: string | null; resolution?: number | null; }; body: {}; answer: DataCheckAnswer }
    | { path: ["datasets", string, "draft"]; query: { }; body: {}; answer: DraftAnswer }
    | { path: ["jobs"]; query: { states?: string | null; limit?: number | null; offset?: number | null; about?: string | null; }; body: {}; answer: JobList }
    | { path: ["jobs", string]; query: { }; body: {}; answer: JobAnswer }
    | { path: ["events"]; query: { topic?: string | null; }; body: {}; answer: any }
    | { path: ["jobs", string, "events"]; query: { }; body: {}; answer: any }
    | { path: ["runs"]; query: { limit?: number | null; }; body: {}; answer: RunList }
    | { path: ["runs", string]; query: { }; body: {}; answer: RunAnswer }
    | { path: ["runs", string, "events"]; query: { }; body: {}; answer: any }
    | { path: ["runs", string, "files", string]; query: { width?: number | null; }; body: {}; answer: any }
    | { path: ["runs", string, "report"]; query: { }; body: {}; answer: any }
    | { path: ["runs", string, "graph"]; query: { notes?: boolean | null; }; body: {}; answer: Record<string, any> }
    | { path: ["runs", string, "drawing"]; query: { }; body: {}; answer: DrawingFacts }
    | { path: ["runs", string, "evaluation"]; query: { }; body: {}; answer: EvaluationAnswer }
    | { path: ["runs", string, "gallery"]; query: { }; body: {}; answer: GalleryAnswer }
    | { path: ["runs", string, "card"]; query: { }; body: {}; answer: any }
    | { path: ["runs", string, "hub-folder"]; query: { }; body: {}; answer: any }
    | { path: ["sweeps"]; query: { }; body: {}; answer: SweepList }
    | { path: ["sweeps", string]; query: { }; body: {}; answer: SweepAnswer }
    | { path: ["openapi.json"]; query: { }; body: {}; answer: Record<string, any> };
  type Post =
    | { path: ["drain"]; query: { }; body: DrainBody; answer: StatusAnswer }
    | { path: ["models"]; query: { }; body: FormData; answer: AddedModel }
    | { path: ["downloads"]; query: { }; body: DownloadBody; answer: DownloadAnswer }
    | { path: ["downloads", "check"]; query: { }; body: DownloadBody; answer: DownloadCheck }
    | { path: ["downloads", string, "cancel"]; query: { }; body: {}; answer: DownloadAnswer }
    | { path: ["datasets"]; query: { }; body: NameBody; answer: DatasetRow }
    | { path: ["datasets", string, "images"]; query: { }; body: FormData; answer: UploadAnswer }
    | { path: ["datasets", string, "remove"]; query: { }; body: FilesBody; answer: RemovedAnswer }
    | { path: ["datasets", string, "restore"]; query: { }; body: RestoreBody; answer: Changed }
    | { path: ["datasets", string, "captioning"]; query: { }; body: CaptioningBody; answer: JobAnswer }
    | { path: ["plans"]; query: { }; body: PlanBody; answer: PlanAnswer }
    | { path: ["measurements"]; query: { }; body: MeasurementBody; answer: JobAnswer }
    | { path: ["jobs"]; query: { }; body: JobBody; answer: JobAnswer }
    | { path: ["jobs", string, "cancel"]; query: { }; body: CancelBody; answer: JobAnswer }
    | { path: ["jobs", string, "continue"]; query: { }; body: {}; answer: JobAnswer }
    | { path: ["jobs", string, "retry"]; query: { }; body: {}; answer: JobAnswer }
    | { path: ["jobs", string, "move"]; query: { }; body: MoveBody; answer: JobAnswer }
    | { path: ["runs", string, "restore"]; query: { }; body: RestoreBody; answer: RunMarks }
    | { path: ["runs", string, "install"]; query: { }; body: InstallBody; answer: InstalledLora }
    | { path: ["runs", string, "drawing"]; query: { }; body: DrawingBody; answer: JobAnswer }
    | { path: ["runs", string, "controls"]; query: { }; body: FormData; answer: KeptControl }
    | { path: ["runs", string, "requests"]; query: { }; body: RequestBody; answer: RequestAnswer }
    | { path: ["runs", string, "evaluation"]; query: { }; body: EvaluationBody; answer: JobAnswer }
    | { path: ["runs", string, "gallery"]; query: { }; body: GalleryBody; answer: JobAnswer }
    | { path: ["runs", string, "hub-folder"]; query: { }; body: HubFolderBody; answer: HubFolder }
    | { path: ["runs", string, "hub-upload"]; query: { }; body: HubUploadBody; answer: HubUpload }
    | { path: ["runs", string, "train-on"]; query: { }; body: TrainOnBody; answer: JobAnswer }
    | { path: ["sweeps"]; query: { }; body: SweepBody; answer: SweepAnswer };
  type Delete =
    | { path: ["downloads", string]; query: { }; body: {}; answer: RemovedDownload }
    | { path: ["datasets", string]; query: { }; body: {}; answer: RemovedAnswer }
    | { path: ["datasets", string, "images", string]; query: { }; body: {}; answer: RemovedAnswer }
    | { path: ["datasets", string, "images", string, "mask"]; query: { }; body: {}; answer: RemovedAnswer }
    | { path: ["datasets", string, "controls", string]; query: { }; body: {}; answer: RemovedAnswer }
    | { path: ["jobs", string]; query: { }; body: {}; answer: RemovedJob }
    | { path: ["runs", string]; query: { }; body: {}; answer: RemovedAnswer };
  type Put =
    | { path: ["hub-token"]; query: { }; body: HubTokenBody; answer: StoredToken }
    | { path: ["datasets", string, "images", string, "crop"]; query: { }; body: Crop; answer: CroppedAnswer }
    | { path: ["datasets", string, "controls"]; query: { }; body: PairBody; answer: Changed }
    | { path: ["datasets", string, "captions"]; query: { }; body: Record<string, string | CaptionEdit>; answer: Changed }
    | { path: ["datasets", string, "draft"]; query: { }; body: DraftBody; answer: DraftAnswer }
    | { path: ["runs", string, "marks"]; query: { }; body: MarksBody; answer: RunMarks };
}
