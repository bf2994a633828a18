// One answer's depth setting: preset buttons and sliders that always show what will apply.

/** The rule before the threshold, whose range it sets. */
const CONTROLS = ["exit_rule", "exit_threshold", "min_loops", "max_loops", "exit_mode"];
const LEARNT = "server's rule";
const DEFAULT = "default";
const CUSTOM = "custom";

export class Settings {
  /** `depth` is the server's `GET /v1/depth`; `choice` the preset to begin with, if it exists. */
  constructor(fieldset, name, depth, choice) {
    this.defaults = depth.defaults;
    this.presets = depth.presets ?? {};
    this.rules = depth.rules;
    this.inputs = Object.fromEntries(
      CONTROLS.map((control) => [control, fieldset.querySelector(`[name=${control}]`)]),
    );
    fieldset.querySelector("legend").textContent = `Depth of answer ${name}`;
    for (const control of ["min_loops", "max_loops"]) this.inputs[control].max = depth.loops;
    this.inputs.exit_mode.append(...depth.modes.map((mode) => new Option(mode, mode)));
    this.inputs.exit_rule.append(...Object.keys(this.rules).map((rule) => new Option(rule, rule)));

    const row = fieldset.querySelector(".presets");
    row.setAttribute("aria-label", `Preset of answer ${name}`);
    this.radios = new Map();
    for (const preset of [DEFAULT, ...Object.keys(this.presets), CUSTOM]) {
      row.append(this.#radio(name, preset));
    }
    fieldset.addEventListener("input", (event) => this.#changed(event.target));
    this.choose(this.radios.has(choice) ? choice : DEFAULT);
  }

  /** The server's defaults are now those of `depth`. */
  refresh(depth) {
    this.defaults = depth.defaults;
    this.choose(this.choice);
  }

  /** Take a preset, "default" or "custom"; the sliders follow. */
  choose(preset) {
    this.choice = preset;
    this.radios.get(preset).checked = true;
    if (preset === CUSTOM) return;
    this.#show(this.defaults);
    this.#show(this.presets[preset] ?? {});
  }

  /** The depth fields of a request: none for the server's default, a preset's name, or numbers. */
  get fields() {
    if (this.choice === DEFAULT) return {};
    if (this.choice !== CUSTOM) return { depth_preset: this.choice };
    const given = CONTROLS.slice(this.#ruled ? 2 : 0);
    return Object.fromEntries(given.map((control) => [control, this.value(control)]));
  }

  /** What tokens leave by: `{rule, threshold}`. */
  get exit() {
    return { rule: this.value("exit_rule"), threshold: this.value("exit_threshold") };
  }

  value(control) {
    const input = this.inputs[control];
    return input.type === "range" ? input.valueAsNumber : input.value;
  }

  /** Whether the server is left to say where to draft: in lossless, with the rule turned off. */
  get #ruled() {
    return this.value("exit_mode") === "lossless" && this.value("exit_threshold") === this.#off;
  }

  get #off() {
    return this.rules[this.value("exit_rule")].off;
  }

  #radio(name, preset) {
    const label = document.createElement("label");
    const radio = document.createElement("input");
    Object.assign(radio, { type: "radio", name: `preset-${name}`, value: preset });
    label.append(radio, preset);
    label.title = this.presets[preset]?.description ?? "";
    this.radios.set(preset, radio);
    return label;
  }

  #changed(input) {
    if (input.type === "radio") return this.choose(input.value);
    const { min_loops: least, max_loops: most } = this.inputs;
    if (least.valueAsNumber > most.valueAsNumber) {
      const other = input === least ? most : least;
      other.value = input.value;
    }
    this.choose(CUSTOM);
    // A threshold has its rule's unit: under another rule it begins where every loop runs.
    if (input === this.inputs.exit_rule) this.#show({ exit_rule: input.value, exit_threshold: this.#off });
    else this.#show({});
  }

  #show(values) {
    for (const [control, input] of Object.entries(this.inputs)) {
      if (values[control] != null) input.value = values[control];
      if (control === "exit_rule") this.inputs.exit_threshold.max = this.rules[input.value].most;
      const told = input.parentElement.querySelector("b");
      if (told) told.textContent = input.value;
    }
    const threshold = this.value("exit_threshold").toFixed(2);
    this.inputs.exit_threshold.parentElement.querySelector("b").textContent =
      this.#ruled ? LEARNT : threshold;
  }
}
