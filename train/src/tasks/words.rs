//! The words that keys of needles are made of: an adjective, a hyphen, a noun.

/// Adjectives.
pub(super) const ADJECTIVES: [&str; 108] = [
    "able", "ample", "amber", "ancient", "arctic", "ashen", "autumn", "bitter", "blank", "blue", "bold", "brave", "brief", "bright", "brisk",
    "broad", "bronze", "calm", "careful", "cheap", "chilly", "civil", "clean", "clear", "clever", "cloudy", "coarse", "cold", "common", "cosmic",
    "crisp", "curious", "damp", "dark", "deep", "dense", "distant", "double", "dry", "dull", "dusty", "eager", "early", "eastern", "empty",
    "endless", "even", "fair", "faint", "famous", "fierce", "fine", "firm", "fresh", "frosty", "gentle", "giant", "golden", "grand", "green", "grey",
    "happy", "heavy", "hidden", "hollow", "honest", "humble", "icy", "idle", "inner", "jolly", "keen", "kind", "large", "late", "lazy", "light",
    "little", "lively", "lonely", "loud", "loyal", "lucky", "mellow", "mild", "misty", "modest", "narrow", "noble", "northern", "odd", "pale",
    "patient", "plain", "proud", "quick", "quiet", "rapid", "rough", "rusty", "silent", "silver", "slow", "smooth", "steady", "sturdy", "sudden",
    "wild",
];

/// Nouns.
pub(super) const NOUNS: [&str; 112] = [
    "acorn", "anchor", "apple", "arch", "arrow", "autumn", "badger", "banner", "barley", "barrel", "basin", "beacon", "beaver", "bell", "birch",
    "boat", "bottle", "branch", "bridge", "brook", "bucket", "button", "cabin", "candle", "canvas", "carpet", "castle", "cedar", "cellar", "chapel",
    "cliff", "cloud", "clover", "compass", "copper", "coral", "cottage", "crane", "cradle", "crystal", "daisy", "desert", "dolphin", "drum", "eagle",
    "ember", "engine", "falcon", "feather", "fern", "ferry", "field", "flute", "forest", "fountain", "garden", "glacier", "hammer", "harbor",
    "harvest", "hazel", "heron", "hill", "island", "ivory", "jacket", "kettle", "ladder", "lagoon", "lantern", "ledger", "lemon", "lily", "linen",
    "lobster", "magnet", "maple", "marble", "market", "meadow", "mirror", "mountain", "needle", "oak", "oar", "orchard", "otter", "paddle", "pebble",
    "pepper", "pigeon", "pillow", "pine", "planet", "pocket", "prairie", "quarry", "rabbit", "raven", "ribbon", "river", "saddle", "sail", "shadow",
    "spoon", "spring", "stable", "summit", "thistle", "timber", "valley", "whistle",
];
