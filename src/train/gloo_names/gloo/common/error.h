// SPDX-License-Identifier: Apache-2.0
// See README.md of this folder.
#pragma once
